"""Several labels a sample, by sigmoids: python examples/multilabel_audio.py

Chords of up to three of twelve notes, each to be heard out, from 0.1 s of sound with noise. Real data: --data FOLDER of
labels.csv (file, then a 0 or 1 for each class; one heading line) and mono 16-bit WAV files.
"""

import csv
import wave
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from shared import Curve, arguments
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mixupe_kernels as mk

RATE, LENGTH = 8000, 800


def chords(count, notes=12):
    """(count, LENGTH) sounds, and (count, notes) labels of 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    number = torch.randint(1, 4, (count, 1), generator=generator)
    labels = (torch.rand(count, notes, generator=generator).argsort(1) < number).to(torch.get_default_dtype())
    pitch = 261.6 * 2 ** (torch.arange(notes) / 12)
    time = torch.arange(LENGTH) / RATE
    phase = 2 * torch.pi * torch.rand(count, notes, 1, generator=generator)
    tones = torch.sin(2 * torch.pi * pitch.view(-1, 1) * time + phase)
    loud = 0.3 + 0.7 * torch.rand(count, notes, 1, generator=generator)
    sound = (labels.unsqueeze(2) * loud * tones).sum(1) + 0.5 * torch.randn(count, LENGTH, generator=generator)
    return sound.to(torch.get_default_dtype()), labels


def folder(path):
    sounds, labels = [], []
    for name, *classes in list(csv.reader((Path(path) / "labels.csv").read_text().splitlines()))[1:]:
        with wave.open(str(Path(path) / name)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / 32768
        sounds.append(np.resize(samples, LENGTH))
        labels.append([float(value) for value in classes])
    dtype = torch.get_default_dtype()
    return torch.tensor(np.stack(sounds), dtype=dtype), torch.tensor(labels, dtype=dtype)


class Network(nn.Module):
    def __init__(self, classes, width=96):
        super().__init__()
        self.register_buffer("window", torch.hann_window(LENGTH))
        bands = LENGTH // 8
        self.layers = nn.Sequential(
            nn.Linear(bands, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, classes)
        )

    def forward(self, sound):
        spectrum = torch.fft.rfft(sound * self.window).abs()[:, : LENGTH // 8]
        return self.layers(torch.log1p(spectrum))


def main():
    args = arguments(__doc__, epochs=12, data="chords")
    (x, labels), curve = chords(3000) if args.data == "chords" else folder(args.data), Curve(args)
    held = len(x) // 4
    train = DataLoader(TensorDataset(x[held:], labels[held:]), args.batch_size, shuffle=True, drop_last=True)
    model = mk.split_batch_norm(Network(labels.shape[1]))
    mixup_fn = mk.MixupE(alpha=0.4, clean_fraction=1 / 4)  # sounds are mixed as they add up in a room
    criterion = mk.MixupELoss(eta=1e-3, clean_weight=1 / 4, activation="sigmoid")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005)
    for epoch in range(args.epochs):
        losses = []
        for sound, heard in track(train, f"epoch {epoch + 1}", transient=True):
            sound, target = mixup_fn(sound, heard)
            loss = criterion(mk.forward_mixupe(model, sound, target), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        model.eval()
        with torch.no_grad():
            wrong = (model(x[:held]) > 0) != (labels[:held] > 0.5)
        model.train()
        curve.add(loss=float(torch.stack(losses).mean()), error=100 * float(wrong.double().mean()))
    curve.save()


if __name__ == "__main__":
    main()
