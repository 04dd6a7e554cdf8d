"""The lines of README's table "if you use … write …" run, each with its library, and train."""

import re
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mixupe_kernels as mk

from . import library

ROOT = Path(__file__).parents[2]
CLASSES = 4


def table() -> dict[str, str]:
    """The lines to write, by what is used."""
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| (.+?) \| (`.+`) \|$", text.split("## If you use")[1].split("\n## ")[0], re.MULTILINE)
    return {re.sub(r"\[(.*?)\]\(.*?\)", r"\1", name): "\n".join(re.findall(r"`(.+?)`", lines)) for name, lines in rows}


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.layers(x))


def images(count=16):
    return TensorDataset(torch.rand(count, 3, 8, 8), torch.randint(CLASSES, (count,)))


def given() -> dict:
    """What a loop has already."""
    x, target = images().tensors
    model = mk.split_batch_norm(Picture())
    return {
        "mk": mk,
        "torch": torch,
        "model": model,
        "x": x,
        "labels": target,
        "target": target,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data": images(),
        "mixup_fn": mk.MixupE(clean_fraction=1 / 4),
        "criterion": mk.MixupELoss(clean_weight=1 / 4),
    }


def run(name: str, **more) -> dict:
    names = {**given(), **more}
    exec(compile(table()[name], f"README, {name}", "exec"), names)
    return names


def trained(names: dict) -> None:
    names["loss"].backward()
    assert names["target"].num_rows > 0 and all(p.grad is not None for p in names["model"].parameters())


def test_the_table_has_every_library_in_three_lines():
    rows = table()
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {re.sub(r"\W+", "_", name.lower()) for name in rows} <= tested
    assert len(rows) >= 10 and all(lines.count("\n") < 3 for lines in rows.values())


def test_timm():
    trained(run("timm", mixup_args={"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "num_classes": CLASSES}))


def test_torchvision():
    trained(run("torchvision"))


def test_workers():
    (batch, *_) = run("workers")["loader"]
    assert isinstance(batch[1], mk.MixedTarget)


def test_lightning():
    pl = library("lightning.pytorch")
    *setup, step = table()["Lightning"].splitlines()
    names = {**given(), "Trainer": lambda **options: options}
    exec("\n".join(setup), names)
    (callback,) = names["trainer"]["callbacks"]

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.criterion = mk.split_batch_norm(Picture()), mk.MixupELoss(clean_weight=1 / 4)

        def training_step(self, batch, batch_idx):
            names = {"self": self, "mk": mk, "batch": batch}
            exec(step, names)
            return names["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet).fit(Module(), DataLoader(images(), 8))
    assert callback.mixup_fn.steps == 2


def test_transformers(tmp_path):
    library("transformers")
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
    )
    config.num_labels = CLASSES
    args = TrainingArguments(
        str(tmp_path), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    data = [{"pixel_values": x, "labels": int(label)} for x, label in images()]
    names = run("Transformers", Trainer=Trainer, model=ViTForImageClassification(config), args=args, data=data)
    names["trainer"].train()
    assert names["trainer"].mixup_fn.steps == 1


def test_torchmetrics():
    library("torchmetrics")
    x, target = mk.MixupE()(*images().tensors)
    logits = torch.randn(len(x), CLASSES)
    names = run("torchmetrics", logits=logits, target=target)
    assert 0 <= float(names["metric"].compute()) <= 1


def test_accelerate():
    accelerator = library("accelerate").Accelerator(cpu=True)
    names = run("Accelerate", accelerator=accelerator, loader=DataLoader(images(), 8))
    assert all(p.grad is not None for p in names["model"].parameters())


def test_skorch():
    library("skorch")
    names = run("skorch", Net=lambda: mk.split_batch_norm(Picture()))
    x, labels = images(40).tensors
    net = names["net"].set_params(max_epochs=1, verbose=0, train_split=None)
    assert net.fit(x.numpy(), labels.numpy()).predict(x.numpy()).shape == (40,)


def test_fastai():
    library("fastai.callback.all")
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    dls = DataLoaders(DataLoader(images(), 8), DataLoader(images(), 8))
    names = run("fastai", Learner=Learner, dls=dls, model=Picture())
    with names["learn"].no_bar(), names["learn"].no_logging():
        names["learn"].fit(1)


def test_pytorch_geometric():
    """``net.readout`` is what pools nodes to graphs; here of rows that are graphs already."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.readout, self.head = Picture().layers, nn.Linear(8, CLASSES)

    class Graphs(torch.Tensor):
        y = torch.randint(CLASSES, (16,))

    names = run("PyTorch Geometric", net=Net(), data=images().tensors[0].as_subclass(Graphs))
    names["loss"].backward()


def test_text():
    embed = nn.Embedding(9, 8)
    names = run("text", model=Text(embed), ids=torch.randint(9, (16, 5)), mask=torch.ones(16, 5).long())
    names["loss"].backward()
    assert embed.weight.grad.abs().sum() > 0


class Text(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed, self.head = embed, nn.Linear(8, CLASSES)

    def forward(self, embedded, mask):
        return self.head((embedded * mask.unsqueeze(2)).mean(1))
