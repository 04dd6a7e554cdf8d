"""Tabular data for the training benchmarks: scikit-learn's bundled sets, ARFF and CSV files, splits and preparation."""

import csv
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BUNDLED = ("digits", "iris", "wine", "breast_cancer")
MISSING = ("?", "", "NA", "NaN", "nan")


class Table(NamedTuple):
    """A classification data set as it was read: nothing imputed, scaled or encoded yet.

    Attributes:
        name: what results are filed under.
        numeric: (n, d) float64, NaN where missing.
        categorical: (n, k) int64 codes from 0, -1 where missing.
        levels: number of codes of each categorical column.
        labels: (n,) int64 in [0, num_classes).
        num_classes: C.
    """

    name: str
    numeric: np.ndarray
    categorical: np.ndarray
    levels: tuple[int, ...]
    labels: np.ndarray
    num_classes: int


def bundled(name: str) -> Table:
    """One of scikit-learn's bundled sets: all columns are numeric and complete."""
    from sklearn import datasets

    x, labels = getattr(datasets, f"load_{name}")(return_X_y=True)
    nothing = np.empty((len(x), 0), dtype=np.int64)
    return Table(name, x.astype(np.float64), nothing, (), labels.astype(np.int64), int(labels.max()) + 1)


def _table(name: str, columns: list[list[str]], levels: list[list[str] | None]) -> Table:
    """Columns of text, the last of them the class; ``levels`` lists a nominal column's values, None is numeric."""
    *features, classes = columns
    *levels, class_levels = levels
    numeric = [
        [np.nan if value in MISSING else float(value) for value in column]
        for column, values in zip(features, levels, strict=True)
        if values is None
    ]
    codes = [
        [-1 if value in MISSING else values.index(value) for value in column]
        for column, values in zip(features, levels, strict=True)
        if values is not None
    ]
    seen = sorted(set(classes), key=(class_levels or sorted(set(classes))).index)
    index = {value: position for position, value in enumerate(seen)}
    rows = len(classes)
    return Table(
        name,
        np.array(numeric, dtype=np.float64).T.reshape(rows, -1),
        np.array(codes, dtype=np.int64).T.reshape(rows, -1),
        tuple(len(values) for values in levels if values is not None),
        np.array([index[value] for value in classes], dtype=np.int64),
        len(seen),
    )


def read_arff(path: Path) -> Table:
    """A dense ARFF file whose class is its last attribute, as in the UCI sets of the paper (§4.2).

    Raises:
        ValueError: if a row has another number of values than there are attributes.
    """
    levels, rows, in_data = [], [], False
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        line = line.strip()
        if not line or line.startswith("%"):
            continue
        if in_data:
            rows.append([value.strip().strip("'\"") for value in line.split(",")])
            if len(rows[-1]) != len(levels):
                raise ValueError(f"{path}: expected {len(levels)} values, got {line!r}")
        elif line.lower().startswith("@attribute"):
            nominal = re.search(r"\{(.*)\}\s*$", line)
            levels.append([value.strip().strip("'\"") for value in nominal[1].split(",")] if nominal else None)
        elif line.lower().startswith("@data"):
            in_data = True
    return _table(path.stem.replace(".", "-"), [list(column) for column in zip(*rows, strict=True)], levels)


def _is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def read_csv(path: Path) -> Table:
    """A CSV file with a header row, whose class is the last column; a column of numbers only is numeric."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [[value.strip() for value in row] for row in csv.reader(file) if row][1:]
    columns = [list(column) for column in zip(*rows, strict=True)]
    levels = []
    for column in columns:
        present = sorted(set(column) - set(MISSING))
        levels.append(None if all(map(_is_number, present)) else present)
    return _table(path.stem.replace(".", "-"), columns, levels)


def folder(directory: Path) -> list[Table]:
    """Every ARFF and CSV file of a directory, by name."""
    readers = {".arff": read_arff, ".csv": read_csv}
    return [readers[path.suffix](path) for path in sorted(directory.iterdir()) if path.suffix in readers]


class Split(NamedTuple):
    """Standardised features, (n, d) float32, and labels, (n,) int64, of each part."""

    x_train: Tensor
    train: Tensor
    x_validation: Tensor
    validation: Tensor
    x_test: Tensor
    test: Tensor


def features(table: Table, fit: np.ndarray) -> Tensor:
    """(n, d) float32 features: means and modes for what is missing, one-hot categories, mean 0 and deviation 1.

    Means, modes and deviations are those of the rows ``fit``, so that nothing of the other rows leaks into them.
    """
    numeric = np.where(np.isnan(table.numeric), np.nanmean(table.numeric[fit], axis=0), table.numeric)
    blocks = [numeric]
    for column, levels in zip(table.categorical.T, table.levels, strict=True):
        known = column[fit]
        mode = np.bincount(known[known >= 0], minlength=levels).argmax()
        blocks.append(np.eye(levels)[np.where(column < 0, mode, column)])
    x = np.concatenate(blocks, axis=1)
    deviation = x[fit].std(axis=0)
    x = (x - x[fit].mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
    return torch.from_numpy(x.astype(np.float32))


def split(table: Table, seed: int, validation: float = 0.2, test: float = 0.2) -> Split:
    """Training, validation and test rows, stratified by class and drawn from ``seed``; fractions are of all rows."""
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(table.labels))
    train, held = train_test_split(rows, test_size=validation + test, stratify=table.labels, random_state=seed)
    if validation:
        share = test / (validation + test)
        chosen, held = train_test_split(held, test_size=share, stratify=table.labels[held], random_state=seed)
    else:
        chosen = held[:0]
    x, labels = features(table, train), torch.from_numpy(table.labels)
    return Split(*(values[part] for part in (train, chosen, held) for values in (x, labels)))


def corrupt(labels: Tensor, share: float, classes: int, seed: int) -> Tensor:
    """``labels`` with ``share`` of them, drawn from ``seed``, replaced by uniformly random ones (mixup, §3.4)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(labels), generator=generator)[: round(share * len(labels))]
    noise = torch.randint(classes, (len(chosen),), generator=generator)
    return labels.index_put((chosen,), noise)


def batches(rows: int, batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Indices of one epoch's batches, in an order drawn from ``generator``, on its device; the last may be smaller."""
    return torch.randperm(rows, generator=generator, device=generator.device).split(batch)
