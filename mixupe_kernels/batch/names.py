"""What is written elsewhere, and what to write here for it."""

# Other libraries' names, and arguments of the loss.
ELSEWHERE = {
    "mixup_alpha": "alpha=, or mixupe_kernels.like_timm, which takes timm's arguments",
    "mode": "per_sample=True for timm's 'elem', per_sample='pair' for 'pair', or mixupe_kernels.like_timm",
    "cutmix_minmax": "it as an argument of mixupe_kernels.like_timm",
    "correct_lam": "it as an argument of mixupe_kernels.like_timm",
    "label_smoothing": "it as an argument of MixupELoss",
    "eta": "it as an argument of MixupELoss",
    "clean_weight": "it as an argument of MixupELoss",
    "lam": "lam_distribution=mixupe_kernels.sampling.Fixed(lam)",
    "p": "prob=",
    "clean_fraction": "MixupE, which has it, for Mixup",
}
