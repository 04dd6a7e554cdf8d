"""Transformers' Trainer with a small ViT: python examples/transformers_trainer.py

What differs from a Trainer without mixing: its class has the mixin, and two arguments. Evaluation, prediction, logs, gradient
accumulation and checkpoints are the Trainer's. A text classifier takes the same lines: its token embeddings are mixed.
"""

import numpy as np
from shared import Curve, arguments, images
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import mixupe_kernels as mk
from mixupe_kernels.integrations.transformers import MixupTrainer


class MixedTrainer(MixupTrainer, Trainer):
    pass


class Rows:
    """A set of (x, label) as the dicts that a Trainer takes."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        x, label = self.data[index]
        return {"pixel_values": x, "labels": int(label)}


def main():
    args = arguments(__doc__, epochs=10)
    data, curve = images(args), Curve(args)
    size = data.train[0][0].shape[-1]
    config = ViTConfig(
        image_size=size,
        patch_size=max(size // 4, 1),
        num_channels=data.channels,
        num_labels=data.classes,
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    options = TrainingArguments(
        "build/transformers",
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size // 2,
        gradient_accumulation_steps=2,
        learning_rate=2e-3,
        warmup_steps=20,
        weight_decay=0.05,
        eval_strategy="epoch",
        logging_strategy="epoch",
        save_strategy="no",
        report_to=[],
        seed=args.seed,
    )
    trainer = MixedTrainer(
        model=ViTForImageClassification(config),
        args=options,
        train_dataset=Rows(data.train),
        eval_dataset=Rows(data.test),
        compute_metrics=lambda p: {"error": 100 * float(np.mean(p.predictions.argmax(-1) != p.label_ids))},
        mixup_fn=mk.MixupE(alpha=0.4, clean_fraction=1 / 4),
        criterion=mk.MixupELoss(eta=1e-3, clean_weight=1 / 4),
    )
    trainer.train()
    logs = trainer.state.log_history
    losses, errors = ([row[key] for row in logs if key in row] for key in ("loss", "eval_error"))
    for loss, error in zip(losses, errors, strict=True):
        curve.add(loss=loss, error=error)
    curve.save()


if __name__ == "__main__":
    main()
