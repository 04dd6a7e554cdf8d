"""skorch on a table: python examples/skorch_tabular.py, or --data a CSV file whose last column is the class.

The class, its collate function and the loss's arguments differ from a NeuralNetClassifier; scikit-learn's tools take it.
"""

import csv
from pathlib import Path

import numpy as np
import torch
from shared import Curve, arguments
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import LabelEncoder, StandardScaler
from skorch.callbacks import Callback, EpochScoring

import mixupe_kernels as mk
from mixupe_kernels.integrations.skorch import MixupClassifier


class Network(torch.nn.Module):
    def __init__(self, features, classes, width=64):
        super().__init__()
        layers = []
        for inputs in (features, width):
            layers += [torch.nn.Linear(inputs, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU()]
        self.layers = mk.split_batch_norm(torch.nn.Sequential(*layers, torch.nn.Linear(width, classes)))

    def forward(self, x):
        return self.layers(x)


class Bar(Callback):
    """A line that grows by a mark a batch."""

    def on_batch_end(self, net, training=None, **_):
        if training:
            print(".", end="", flush=True)

    def on_epoch_end(self, net, **_):
        print()


class Save(Callback):
    def __init__(self, curve):
        self.curve = curve

    def on_epoch_end(self, net, **_):
        last = net.history[-1]
        self.curve.add(loss=last["train_loss"], valid_loss=last["valid_loss"], error=100 * (1 - last["accuracy"]))


def table(name):
    if name == "digits":  # 64 numbers a row
        return load_digits(return_X_y=True)
    rows = list(csv.reader(Path(name).read_text().splitlines()))
    return np.array([row[:-1] for row in rows[1:]], dtype=float), np.array([row[-1] for row in rows[1:]])


def as_default_dtype(x):
    return x.astype(torch.zeros(()).numpy().dtype)


def main():
    args = arguments(__doc__, epochs=15)
    x, labels = table(args.data)
    labels, curve = LabelEncoder().fit_transform(labels).astype(np.int64), Curve(args)
    parts = train_test_split(as_default_dtype(x), labels, test_size=0.25, random_state=0, stratify=labels)
    x, test, labels, test_labels = parts
    net = MixupClassifier(
        Network,
        module__features=x.shape[1],
        module__classes=int(labels.max()) + 1,
        criterion__eta=1e-3,
        criterion__clean_weight=1 / 4,
        iterator_train__collate_fn=mk.Collate(mk.MixupE(alpha=0.2, clean_fraction=1 / 4)),
        iterator_train__shuffle=True,
        iterator_train__drop_last=True,
        optimizer=torch.optim.Adam,
        lr=0.005,
        max_epochs=args.epochs,
        batch_size=args.batch_size,
        callbacks=[Bar(), EpochScoring("accuracy", lower_is_better=False), Save(curve)],
        verbose=0,
    )
    pipeline = make_pipeline(StandardScaler(), net).fit(x, labels)
    print(f"test error {100 * (1 - pipeline.score(test, test_labels)):.2f} %")
    curve.save()


if __name__ == "__main__":
    main()
