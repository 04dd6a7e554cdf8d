"""Text: token ids cannot be mixed, their embeddings can: python examples/text_embeddings.py

Which library is a docstring of? numpy, scipy, sklearn and torch are on the machine. Other texts: --data a TSV file of
text and class. Masks of padding follow their rows.
"""

import importlib
import inspect
import re
from pathlib import Path

import torch
from rich.progress import track
from shared import Curve, arguments
from torch import nn

import mixupe_kernels as mk

MODULES = ("numpy", "scipy.stats", "scipy.signal", "sklearn.preprocessing", "sklearn.metrics", "torch", "torch.nn")
LENGTH = 32


def docstrings():
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute in sorted(dir(module)):
            text = inspect.getdoc(getattr(module, attribute, None)) or ""
            for part in text.split("\n\n")[:4]:
                if len(part) > 40:
                    yield part.replace(name.split(".")[0], " "), name.split(".")[0]


def texts(args):
    """(n, LENGTH) ids, 0 where there is no word; labels; the numbers of words and classes."""
    if args.data == "docstrings":
        rows = list(docstrings())
    else:
        rows = [line.rsplit("\t", 1) for line in Path(args.data).read_text().splitlines()]
    words = [re.findall(r"[a-z]+", text.lower())[:LENGTH] for text, _ in rows]
    vocabulary = {word: number for number, word in enumerate(sorted({word for row in words for word in row}), 1)}
    classes = sorted({name for _, name in rows})
    ids = torch.zeros(len(rows), LENGTH, dtype=torch.int64)
    for row, found in enumerate(words):
        ids[row, : len(found)] = torch.tensor([vocabulary[word] for word in found], dtype=torch.int64)
    return ids, torch.tensor([classes.index(name) for _, name in rows]), len(vocabulary) + 1, len(classes)


class Network(nn.Module):
    def __init__(self, words, classes, width=32):
        super().__init__()
        self.embed = nn.Embedding(words, width, padding_idx=0)
        self.attend = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.1, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, embedded, mask):
        hidden = self.attend(embedded, src_key_padding_mask=~mask)
        return self.head((hidden * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True))


def main():
    args = arguments(__doc__, epochs=6, data="docstrings")
    (ids, labels, words, classes), curve = texts(args), Curve(args)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(ids) // 5], order[len(ids) // 5 :]
    net = Network(words, classes)
    mixup_fn, criterion = mk.MixupE(alpha=0.4, clean_fraction=1 / 4), mk.MixupELoss(eta=1e-3, clean_weight=1 / 4)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    for epoch in range(args.epochs):
        losses = []
        for rows in track(
            train[torch.randperm(len(train))].split(args.batch_size), f"epoch {epoch + 1}", transient=True
        ):
            batch = {"embedded": net.embed(ids[rows]), "mask": ids[rows] != 0, "labels": labels[rows]}
            batch, target = mixup_fn(batch)  # embeddings are mixed, masks follow
            loss = criterion(net(batch["embedded"], batch["mask"]), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        with torch.no_grad():
            net.eval()
            wrong = net(net.embed(ids[test]), ids[test] != 0).argmax(1) != labels[test]
            net.train()
        curve.add(loss=float(torch.stack(losses).mean()), error=100 * float(wrong.double().mean()))
    curve.save()


if __name__ == "__main__":
    main()
