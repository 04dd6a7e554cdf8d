"""timm: its mixer and ours given the same λ and boxes, its prefetcher, its layers, and its script's calls."""

import numpy as np
import pytest
import torch

import mixupe_kernels as mk
from mixupe_kernels.batch.plan import Draw

from . import library

timm = library("timm")
for part in ("data", "loss", "optim", "utils"):
    library(f"timm.{part}")
CLASSES = 10


def batch(count=8, size=16):
    return torch.rand(count, 3, size, size), torch.randint(CLASSES, (count,))


class Recorded:
    """timm's mixer with each λ and box that it draws in the order of the samples, from the functions it calls."""

    def __init__(self, monkeypatch, **options):
        self.boxes, self.mixer = [], timm.data.Mixup(num_classes=CLASSES, **options)
        module = timm.data.mixup
        draw = module.cutmix_bbox_and_lam

        def recorded(*args, **kwargs):
            box, lam = draw(*args, **kwargs)
            self.boxes.append((*map(int, box), float(lam)))
            return box, lam

        monkeypatch.setattr(module, "cutmix_bbox_and_lam", recorded)


@pytest.mark.parametrize("cutmix", [False, True])
@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_rows_and_targets_of_the_same_lam_and_boxes(cutmix, mode, smoothing, monkeypatch):
    alphas = {"mixup_alpha": 0.0, "cutmix_alpha": 1.0} if cutmix else {"mixup_alpha": 0.8}
    theirs = Recorded(monkeypatch, mode=mode, label_smoothing=smoothing, **alphas)
    np.random.seed(3)
    x, labels = batch()[0], torch.randperm(CLASSES)[:8]
    expected, dense = theirs.mixer(x.clone(), labels)
    if cutmix:
        lam = torch.tensor([box[4] for box in theirs.boxes])
        box = torch.tensor([(top, low, left, right) for top, low, left, right, _ in theirs.boxes])
        if mode == "pair":
            lam, box = torch.cat([lam, lam.flip(0)]), torch.cat([box, box.flip(0)])
        lam, box, pixel_lam = lam.expand(8), box[0] if mode == "batch" else box, torch.ones(8)
    else:
        # timm's targets say which λ it drew: the own class's share, since all labels differ.
        lam = ((dense.gather(1, labels.view(-1, 1)) - smoothing / CLASSES) / (1 - smoothing)).squeeze(1)
        pixel_lam, box = lam, None
    target = mk.MixedTarget(labels, labels.flip(0), lam, 8, 0, 0.0)
    ours, criterion = mk.like_timm(mode=mode, label_smoothing=smoothing, num_classes=CLASSES, **alphas)
    rows = ours.apply(Draw(8, None, pixel_lam, target, box=box), x)
    torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(target.dense(CLASSES, smoothing), dense, rtol=1e-5, atol=1e-6)
    logits = torch.randn(8, CLASSES, dtype=torch.float64)
    loss = timm.loss.SoftTargetCrossEntropy()(logits, dense.double())
    torch.testing.assert_close(criterion(logits, target), loss, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
@pytest.mark.parametrize("options", [{}, {"cutmix_alpha": 1.0}, {"cutmix_minmax": (0.3, 0.8)}, {"prob": 0.5}], ids=str)
def test_the_same_law_of_lam(mode, options):
    """Means and standard deviations of the targets' λ over many batches, within 4.5 standard errors."""
    ours, _ = mk.like_timm(mode=mode, num_classes=2, label_smoothing=0.0, **options)
    theirs = timm.data.Mixup(mode=mode, num_classes=2, label_smoothing=0.0, **options)
    np.random.seed(0)
    x, labels = torch.zeros(2, 1, 64, 64), torch.tensor([0, 1])
    drawn = torch.stack([ours(x, labels)[1].lam[:1] for _ in range(3000)]).double()
    expected = torch.stack([theirs(x.clone(), labels)[1][0, :1] for _ in range(3000)]).double()
    for power in (1, 2):
        ours_now, theirs_now = drawn**power, expected**power
        error = ((ours_now.var() + theirs_now.var()) / 3000) ** 0.5
        # A pixel's share: timm's sides are of any number of pixels.
        assert abs(ours_now.mean() - theirs_now.mean()) < 4.5 * error + 1 / 64


class Images(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return np.full((3, 8, 8), index * 16, dtype=np.uint8), index % CLASSES


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, {"clean_fraction": 1 / 2}], ids=str)
def test_the_prefetcher(workers, options):
    from timm.data.loader import PrefetchLoader

    from mixupe_kernels.integrations.timm import FastCollate

    mixup_fn, criterion = mk.like_timm(num_classes=CLASSES, **options)
    loader = torch.utils.data.DataLoader(Images(), 8, collate_fn=FastCollate(mixup_fn), num_workers=workers)
    loader = PrefetchLoader(loader, mean=(0.5,) * 3, std=(0.25,) * 3, device=torch.device("cpu"))
    assert loader.mixup_enabled
    for x, target in loader:
        assert x.dtype == torch.float32 and x.shape == (target.num_rows, 3, 8, 8)
        assert target.num_rows == (16 if options else 8)
        assert criterion(torch.randn(target.num_rows, CLASSES), target).isfinite()
        samples = (x * 0.25 + 0.5) * 255  # normalised after it was mixed, and rounded then
        torch.testing.assert_close(samples, samples.round(), rtol=0, atol=1e-2)
    loader.mixup_enabled = False
    assert not mixup_fn.enabled
    for x, target in loader:
        assert len(x) == 8 and bool((target.lam == 1).all())


def test_uint8_in_and_out():
    from mixupe_kernels.integrations.timm import FastCollate

    x, target = FastCollate(mk.like_timm(num_classes=CLASSES)[0])([Images()[i] for i in range(8)])
    lam, first = float(target.lam[0]), torch.arange(8) * 16.0
    assert x.dtype == torch.uint8
    torch.testing.assert_close(x[:, 0, 0, 0].float(), (lam * first + (1 - lam) * first.flip(0)).round(), rtol=0, atol=1)
    with pytest.raises(TypeError, match="mixup_fn must be a Mixup or MixupE, got Mixup"):
        FastCollate(timm.data.Mixup())


def test_create_loader():
    from mixupe_kernels.integrations.timm import FastCollate

    class Pictures(Images):
        transform = None

        def __getitem__(self, index):
            from PIL import Image

            image = Image.fromarray(np.full((8, 8, 3), index, dtype=np.uint8))
            return (self.transform(image) if self.transform else image), index % CLASSES

    mixup_fn, _ = mk.like_timm(num_classes=CLASSES, clean_fraction=1 / 2)
    loader = timm.data.create_loader(
        Pictures(),
        input_size=(3, 8, 8),
        batch_size=8,
        is_training=True,
        num_workers=1,
        collate_fn=FastCollate(mixup_fn),
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    assert all(target.num_mixed == 8 and len(x) == 16 for x, target in loader)


def test_a_model_with_its_batch_norm():
    torch.manual_seed(0)
    model = mk.split_batch_norm(timm.create_model("resnet18", num_classes=CLASSES))
    assert any(isinstance(layer, mk.batch.batch_norm.SplitBatchNorm) for layer in model.modules())
    mixup_fn, criterion = mk.like_timm(num_classes=CLASSES, clean_fraction=1 / 2)
    x, target = mixup_fn(*batch(size=32))
    criterion(mk.forward_mixupe(model, x, target), target).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with pytest.raises(RuntimeError, match=r"forward_mixupe\(model, x, target\)"):
        model(x)


def test_ema_and_checkpointing():
    model = timm.create_model("resnet18", num_classes=CLASSES)
    model.set_grad_checkpointing()
    model = mk.split_batch_norm(model)
    ema = timm.utils.ModelEmaV3(model, decay=0.5)
    mixup_fn, criterion = mk.like_timm(num_classes=CLASSES, clean_fraction=1 / 2)
    optimizer = timm.optim.create_optimizer_v2(model, opt="sgd", lr=0.1)
    x, target = mixup_fn(*batch(size=32))
    criterion(mk.forward_mixupe(model, x, target), target).backward()
    optimizer.step()
    ema.update(model)
    before = model.bn1.running_mean
    assert ema.module.bn1.running_mean.abs().sum() > 0 and ema.module.bn1.running_mean.shape == before.shape
    assert ema.module.eval()(batch(size=32)[0]).isfinite().all()
