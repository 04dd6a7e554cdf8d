"""Lightning: a callback mixes, and the module's training_step gets (x, target): python examples/lightning_fit.py

Four lines differ from a module without mixing; they are marked.
"""

import lightning.pytorch as pl
import torch
from shared import Curve, arguments, images, small_cnn

import mixupe_kernels as mk
from mixupe_kernels.integrations.lightning import MixupCallback
from mixupe_kernels.integrations.torchmetrics import MixedAccuracy


class Classifier(pl.LightningModule):
    def __init__(self, channels, classes, curve):
        super().__init__()
        self.model = mk.split_batch_norm(small_cnn(channels, classes))  # 1: only for BatchNorm
        self.criterion = mk.MixupELoss(eta=1e-3, clean_weight=1 / 4)  # 2: was CrossEntropyLoss()
        self.train_accuracy, self.accuracy = MixedAccuracy(), MixedAccuracy()
        self.curve = curve

    def training_step(self, batch, batch_idx):
        x, target = batch
        logits = mk.forward_mixupe(self.model, x, target)  # 3: was self.model(x)
        self.train_accuracy(logits, target)
        loss = self.criterion(logits, target)
        self.log("train/loss", loss, on_epoch=True, on_step=False, batch_size=len(x), prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        x, labels = batch
        self.accuracy(self.model(x), labels)

    def on_validation_epoch_end(self):
        self.log("error", 100 * (1 - self.accuracy.compute()), prog_bar=True)
        self.accuracy.reset()

    def on_train_epoch_end(self):
        metrics = self.trainer.callback_metrics
        self.curve.add(
            loss=float(metrics["train/loss"]),
            accuracy=float(self.train_accuracy.compute()),
            error=float(metrics["error"]),
        )
        self.train_accuracy.reset()

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main():
    args = arguments(__doc__, epochs=12)
    data, curve = images(args), Curve(args)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[MixupCallback(mk.MixupE(alpha=1.0, clean_fraction=1 / 4))],  # 4
        accelerator="auto",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(data.channels, data.classes, curve), *data.loaders(args))
    curve.save()


if __name__ == "__main__":
    main()
