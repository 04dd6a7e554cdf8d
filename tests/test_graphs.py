"""What a captured CUDA graph reads lies where it lay: shown with a capture that is only said to be one (test_gpu.py has real ones)."""

import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import mixupe_kernels as mk
from mixupe_kernels import conventions
from mixupe_kernels.batch import mixup

META, CPU = torch.device("meta"), torch.device("cpu")


@pytest.fixture
def capture(monkeypatch):
    """A list: a graph is being captured, on any device but the CPU, while it has an element."""
    capturing = []
    for room in (conventions, mixup):
        monkeypatch.setattr(room, "is_capturing", lambda device: bool(capturing) and device.type != "cpu")
    return capturing


class Writes(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.values = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.fill_ and args[0].is_meta:
            self.values.append(args[1])
        return func(*args, **(kwargs or {}))


def test_a_devices_constant_stays_where_it_is(monkeypatch):
    monkeypatch.setattr(conventions, "_tensors", kept := {})
    first = conventions.sequence(1, META)
    for size in range(2 * conventions._LIMIT):
        conventions.sequence(size, META), conventions.sequence(size, CPU)
    assert conventions.sequence(1, META) is first
    assert len(kept) <= conventions._LIMIT
    assert conventions.sequence(10_000, META) is not conventions.sequence(10_000, META)  # there is no more room


def test_a_graph_keeps_its_constants_to_itself(monkeypatch, capture):
    monkeypatch.setattr(conventions, "_tensors", kept := {})
    before = conventions.sequence(3, META)
    capture.append(True)
    assert conventions.sequence(3, META) is before
    conventions.sequence(4, META)
    conventions.sequence(5, CPU)
    assert {key[0][1:] for key in kept} == {(3, META), (5, CPU)}


def test_a_constant_is_waited_for_once_so_that_every_stream_has_it(monkeypatch):
    waited = []

    class Stream:
        synchronize = staticmethod(lambda: waited.append(True))

    monkeypatch.setattr(conventions, "_tensors", {})
    monkeypatch.setattr(conventions, "Tensor", FakeTensor)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode():
        first = conventions.sequence(3, torch.device("cuda", 0))
        assert first.device.type == "cuda" and waited == [True]
        assert conventions.sequence(3, torch.device("cuda", 0)) is first and waited == [True]


@pytest.mark.parametrize("alpha", [1.0, mk.LinearRamp(0.2, 1.0, last_epoch=4)])
def test_an_epoch_is_written_where_graphs_read_it(alpha):
    mixer = mk.MixupE(alpha=alpha, eta_ramp=mk.LinearRamp(0, 1, last_epoch=4))
    with META:
        x, labels = torch.randn(4, 3), torch.arange(4)
        weight = mixer(x, labels)[1].reg_weight
        gammas = list(mixer.plan._alphas.values())
        with Writes() as written:
            mixer.set_epoch(2)
        again = mixer(x, labels)[1].reg_weight
    assert again is weight and again.shape == () and list(mixer.plan._alphas.values()) == gammas
    now = mixer.lam_distribution.alpha
    assert written.values == [mixer.plan.reg_weight, *([now, now] if gammas else [])]
    assert bool(gammas) == isinstance(alpha, mk.LinearRamp)
    copied = pickle.loads(pickle.dumps(mixer))
    assert copied.plan._weights == copied.plan._alphas == copied.plan.law.gammas._on_devices == {}
    assert (copied.plan.law.gammas._on_devices is copied.plan._alphas) == bool(gammas)
    assert isinstance(mixer(torch.randn(4, 3), torch.arange(4))[1].reg_weight, float)


def test_eta_is_written_where_graphs_read_it():
    criterion = mk.MixupELoss(eta=0.1)
    with META:
        criterion(torch.randn(4, 3), torch.arange(3).repeat(2)[:4])
        with Writes() as written:
            criterion.eta = 0.7
    assert written.values == [0.7]


def test_what_would_freeze_in_a_graph_asks_for_a_first_call(capture):
    criterion, mixer = mk.MixupELoss(), mk.MixupE(eta_ramp=mk.LinearRamp(0, 1, last_epoch=4))
    with META:
        x, labels = torch.randn(4, 3), torch.arange(4) % 3
        capture.append(True)
        for call in (lambda: criterion(x, labels), lambda: mixer(x, labels)):
            with pytest.raises(
                RuntimeError, match="must be called once on meta, to warm up, before a CUDA graph is captured"
            ):
                call()
        capture.clear()
        criterion(x, labels), mixer(x, labels)
        capture.append(True)
        criterion(x, labels), mixer(x, labels)
        mk.MixupE(alpha=0.4, mean=(0.5,) * 3, std=(1.0,) * 3)(
            x, labels
        )  # nothing changes there: its first call may be captured


def test_generators_are_not_read_while_a_graph_is_captured(monkeypatch, capture):
    def read(*_):
        raise AssertionError("a generator's state was read")

    mixer = mk.MixupE(lam_distribution=lambda size, generator, device: torch.full(size, 0.5, device=device))
    with META:
        x, labels, out = torch.randn(4, 3), torch.arange(4), torch.empty(8, 3)
        monkeypatch.setattr(mixup.saved_state, "restored_on_error", read)
        with pytest.raises(AssertionError, match="was read"):
            mixer(x, labels, out=out)
        capture.append(True)
        mixer(x, labels, out=out)


def test_a_lam_on_the_cpu_reaches_a_device_out_of_pinned_memory(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    original = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *a, **k: calls.append(k.get("non_blocking")) or original(*a, **k))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    given = torch.tensor(0.5, dtype=torch.float64)
    with FakeTensorMode(allow_non_fake_inputs=True):
        lam = conventions.moved("lam", given, torch.device("cuda", 0), torch.float32)
    assert lam.device.type == "cuda" and lam.dtype == torch.float32
    assert calls == [None, "pinned", True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="lam must be on cuda:0 while a CUDA graph is captured, got cpu"):
        conventions.moved("lam", torch.tensor(0.5), torch.device("cuda", 0), torch.float32)


def test_a_few_numbers_reach_a_device_as_arguments():
    for values in ([0.5, 0.25], [1.0, 1.0, 1.0], [3]):
        assert conventions.vector(values, torch.float64, CPU).tolist() == values
        assert conventions.vector(values, torch.float32, META).shape == (len(values),)
