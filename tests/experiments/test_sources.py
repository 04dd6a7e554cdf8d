"""Real sets by path: files made up in their formats are read as they were written."""

import numpy as np
import pytest
import torch

from experiments import frame, image_sets, sources, speech

from . import folders


def test_svhn_is_read_from_its_folder(tmp_path):
    assert image_sets.in_folder(folders.svhn(tmp_path)) == ["svhn"]
    x_train, train, x_test, test = image_sets.FOLDERS["svhn"](tmp_path / "svhn")
    for x, labels in ((x_train, train), (x_test, test)):
        assert x.shape == (12, 3, 32, 32) and x.dtype == torch.uint8 and labels.dtype == torch.int64
        assert labels.tolist() == [*range(10), 0, 1]
        assert torch.equal(x[:, :, 0, 31].long(), torch.arange(12)[:, None] * torch.tensor([1, 2, 3]))
    assert image_sets.from_folder(tmp_path, "svhn").classes == 10


def test_tiny_imagenet_is_read_from_its_folder(tmp_path):
    assert image_sets.in_folder(folders.tiny_imagenet(tmp_path)) == ["tiny-imagenet-200"]
    x_train, train, x_test, test = image_sets.FOLDERS["tiny-imagenet-200"](tmp_path / "tiny-imagenet-200")
    assert x_train.shape == (6, 3, 64, 64) and train.tolist() == [0, 0, 1, 1, 2, 2] and test.tolist() == [0, 1, 2]
    for x, labels in ((x_train, train), (x_test, test)):  # classes are numbered as wnids.txt lists them
        colours = torch.tensor(list(folders.COLOURS.values()))[labels]
        assert (x.float().mean((2, 3)) - colours).abs().max() < 3  # JPEG rounds
    assert image_sets.from_folder(tmp_path, "tiny-imagenet-200").x_test.shape == (3, 3, 64, 64)


def test_commands_are_read_from_wav_files(tmp_path):
    read = sources.utterances(folders.commands(tmp_path))
    assert read is sources.utterances(tmp_path)  # once for all cells
    assert (read.name, read.classes, read.x_train.shape, read.x_test.shape) == (
        "Google commands",
        2,
        (6, 1, 160, 101),
        (4, 1, 160, 101),
    )
    assert read.train.tolist() == [0] * 3 + [1] * 3 and read.test.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(read.x_train.mean((0, 3)), torch.zeros(1, 160), rtol=0, atol=1e-5)
    tones = [folders.COMMANDS[word] // 50 for word in sorted(folders.COMMANDS)]  # a row is 50 Hz
    for x, label in zip(read.x_test[:, 0, :, :51].mean(2), read.test.tolist(), strict=True):
        assert x[tones[label]] > 0.5 > -0.5 > x[tones[1 - label]]
    for network in speech.PAPER:
        for options in (frame.Options(quick=True), frame.Options(full=True)):
            assert speech.build(network, read, options)(read.x_train[:2]).shape == (2, 2)


@pytest.mark.parametrize("samples, frames", [(16_000, 101), (8_000, 51), (20_000, 101)])
def test_a_spectrogram_ends_in_zeros(samples, frames):
    sound = torch.sin(2 * torch.pi * 1000 * torch.arange(samples) / 16_000)
    found = sources.spectrogram(sound)
    assert found.shape == (160, 101) and (found[:, frames:] == 0).all()
    within = found[:, :frames]
    assert within.mean().item() == pytest.approx(0, abs=1e-4) and within.std().item() == pytest.approx(1, abs=1e-3)
    assert within.mean(1).argmax().item() == 20


@pytest.mark.parametrize("sound", [torch.zeros(0), torch.zeros(16_000), torch.ones(1)])
def test_a_spectrogram_of_nothing_is_nothing(sound):
    found = sources.spectrogram(sound)
    assert found.shape == (160, 101) and found.abs().max() < 0.01


def test_a_sound_of_another_rate_is_refused(tmp_path):
    folders.wav(tmp_path / "a.wav", np.zeros(80), rate=8_000)
    with pytest.raises(ValueError, match=r"a\.wav: expected 1 channel, 16 bits, 16000 Hz, got \(1, 16, 8000\)"):
        sources.read_wav(tmp_path / "a.wav")
    folders.wav(tmp_path / "b.wav", np.array([0.0, 0.5, -1.0]))
    torch.testing.assert_close(sources.read_wav(tmp_path / "b.wav"), torch.tensor([0.0, 0.5, -1.0]), rtol=0, atol=1e-4)


def test_spectrograms_that_were_kept_come_first(tmp_path):
    folders.commands(tmp_path)
    for part, count in (("train", 5), ("test", 3)):
        x = np.random.default_rng(0).normal(3, 2, (count, 160, 101)).astype(np.float32)
        np.savez(tmp_path / f"commands-{part}.npz", x=x, y=np.arange(count) % 2)
    read = sources.utterances(tmp_path)
    assert read.x_train.shape == (5, 1, 160, 101) and read.test.tolist() == [0, 1, 0]
    torch.testing.assert_close(read.x_train.mean((0, 3)), torch.zeros(1, 160), rtol=0, atol=1e-5)


def test_graphs_without_kinds_of_nodes_have_degrees(tmp_path):
    folders.graphs(tmp_path, "PLAIN")
    (tmp_path / "PLAIN/PLAIN_node_labels.txt").unlink()
    folders.graphs(tmp_path, "RINGS")
    plain, rings = sources.graphs(tmp_path)
    assert (plain.name, rings.name, plain.classes) == ("PLAIN", "RINGS", 2)
    assert torch.equal(plain.edges, rings.edges) and torch.equal(plain.labels, rings.labels)
    assert torch.equal(plain.x.argmax(1), plain.edges[1].bincount(minlength=len(plain.x)))  # 2 in a ring, 3 at a chord
    assert set(plain.x.argmax(1).tolist()) == {2, 3}
