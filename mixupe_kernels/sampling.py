"""Where λ and partners come from: distributions of the mixing weight, and pairings of a batch.

Everything is drawn from torch generators, on the device of the batch, without synchronising: the same seed gives the
same batch, on one device and version of PyTorch.
"""

import torch
from torch import Tensor

from . import checks


def expected_a_lambda(alpha: float, beta: float | None = None) -> float:
    """The weight w of MixupE's regularizer for λ ~ Beta(alpha, beta): w = 2αβ / ((α + β)(α + β + 1)).

    w = E[1 - λ] under D_λ = α/(α+β)·Beta(α+1, β) + β/(α+β)·Beta(β+1, α) (MixupE, Zou et al., 2023, §2.1 and 2.3), which
    is 2·E[λ(1 - λ)] under Beta(α, β). For α = β it is α / (2α + 1).

    Args:
        alpha: first parameter, > 0.
        beta: second parameter, > 0; alpha if None.

    Returns:
        w in (0, 1/2).

    Raises:
        ValueError, TypeError: if a parameter is not a finite number > 0.
    """
    alpha = checks.positive("alpha", alpha)
    beta = alpha if beta is None else checks.positive("beta", beta)
    total = alpha + beta
    return 2 * (alpha / total) * (beta / (total + 1))


def _log_gamma_variate(shape: float, size: tuple[int, ...], generator, device) -> Tensor:
    """log G, G ~ Gamma(shape, 1): log of Gamma(shape + 1) plus log(U)/shape (Marsaglia and Tsang, 2000, §6).

    In the log domain, because Gamma(0.01) itself underflows float32 four times in ten.
    """
    concentration = torch.full(size, shape + 1, dtype=torch.float64, device=device)
    boosted = torch._standard_gamma(concentration, generator=generator)
    uniform = torch.rand(size, dtype=torch.float64, device=device, generator=generator)
    return boosted.log() + torch.log1p(-uniform) / shape


class Beta:
    """λ ~ Beta(alpha, beta), exact for parameters as small as 1e-3 and below."""

    def __init__(self, alpha: float, beta: float | None = None):
        self.alpha = checks.positive("alpha", alpha)
        self.beta = self.alpha if beta is None else checks.positive("beta", beta)
        self.expected_a_lambda = expected_a_lambda(self.alpha, self.beta)

    def sample(self, size: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Tensor:
        """λ of shape ``size``, float32 in [0, 1], on ``device``."""
        difference = _log_gamma_variate(self.alpha, size, generator, device) - _log_gamma_variate(
            self.beta, size, generator, device
        )
        return torch.sigmoid(difference).float()

    def __repr__(self) -> str:
        return f"Beta({self.alpha:g}, {self.beta:g})"


def _random(size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.randperm(size, generator=generator, device=device)


def _flip(size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.arange(size - 1, -1, -1, device=device)


def _roll(size: int, generator: torch.Generator | None, device: torch.device) -> Tensor:
    return torch.arange(-1, size - 1, device=device).remainder_(max(size, 1))


# partner(i) for i < size, as int64 on ``device``: a random permutation (mixup's code), size - 1 - i (timm's Mixup),
# i - 1 modulo size (torchvision's v2.MixUp, which rolls the batch by one).
PAIRINGS = {"random": _random, "flip": _flip, "roll": _roll}
