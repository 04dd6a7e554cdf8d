"""Folders of data in the formats that experiments read, with made-up contents."""

import numpy as np
import torch


def utterances(folder, speakers=3, each=4):
    """JapaneseVowels' two files with a few utterances of each speaker."""
    generator = np.random.default_rng(0)
    place = folder / "JapaneseVowels"
    place.mkdir(parents=True)
    for part in ("TRAIN", "TEST"):
        lines = ["# made up", "@problemName JapaneseVowels", "@data"]
        for speaker in range(1, speakers + 1):
            for index in range(each):
                series = generator.normal(speaker, 1, (12, 7 + index))
                lines.append(":".join(",".join(f"{value:.4f}" for value in row) for row in series) + f":{speaker}")
        (place / f"JapaneseVowels_{part}.ts").write_text("\n".join(lines) + "\n")
    return folder


def graphs(folder, name="RINGS", count=30):
    """A TU set: rings of 4 to 8 nodes are one class, rings with a chord the other."""
    place = folder / name
    place.mkdir(parents=True)
    edges, graph, kinds, labels, first = [], [], [], [], 1
    for index in range(count):
        size, label = 4 + index % 5, index % 2
        pairs = [(i, (i + 1) % size) for i in range(size)] + [(0, 2)] * label
        edges += [(first + a, first + b) for pair in pairs for a, b in (pair, pair[::-1])]
        graph += [index + 1] * size
        kinds += [i % 3 for i in range(size)]
        labels.append(2 * label - 1)
        first += size
    for ending, lines in (
        ("A", [f"{a}, {b}" for a, b in edges]),
        ("graph_indicator", graph),
        ("node_labels", kinds),
        ("graph_labels", labels),
    ):
        (place / f"{name}_{ending}.txt").write_text("\n".join(map(str, lines)) + "\n")
    return folder


def cifar(folder, count=20):
    import pickle

    place = folder / "cifar-10-batches-py"
    place.mkdir(parents=True)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = (
            torch.randint(256, (count, 3072), generator=torch.Generator().manual_seed(len(name)))
            .to(torch.uint8)
            .numpy()
        )
        (place / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 10 for i in range(count)]}))
    return folder
