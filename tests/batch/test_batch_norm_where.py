"""Where a model with split BatchNorm runs: half precision, strides, checkpoints, compiled, over processes, averaged."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

import mixupe_kernels as mk

from .networks import images, network, randomised, statistics, step, target_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_layer", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_half_precision(dtype, half_layer, affine):
    layer = randomised(nn.BatchNorm2d(6, affine=affine))
    layer = layer.to(dtype) if half_layer else layer
    parts = copy.deepcopy(layer), copy.deepcopy(layer)
    mk.split_batch_norm(layer)
    x = torch.randn(11, 6, 4, 3).to(dtype)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours = mk.forward_mixupe(layer, inputs[0], target_of(11, 7))
    by_parts = torch.cat([parts[0](inputs[1][:7]), parts[1](inputs[1][7:])])
    ours.backward(x), by_parts.backward(x)
    assert ours.dtype is dtype
    # A layer in half precision is PyTorch's; another computes in float32, as PyTorch does, and rounds once.
    one = {"rtol": 0, "atol": 0} if half_layer else {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
    torch.testing.assert_close(ours, by_parts, **one)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, **one)
    torch.testing.assert_close(statistics(layer), statistics(parts[1]), **({} if not half_layer else one))


def test_autocast():
    model = mk.split_batch_norm(network())
    x, target = images()
    with torch.autocast("cpu", torch.bfloat16):
        logits, gradients = step(model, model, x, target)
    reference, expected = step(model, model, x, target)
    assert logits.dtype is torch.bfloat16 and model[1].running_var.dtype is torch.float32
    torch.testing.assert_close(logits.float(), reference, rtol=0.1, atol=0.1)
    torch.testing.assert_close(gradients, expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("num_mixed", [14, 19])
def test_channels_last_stays(num_mixed):
    layer = mk.split_batch_norm(randomised(nn.BatchNorm2d(6)))
    x = torch.randn(20, 6, 4, 3)
    kept = x.to(memory_format=torch.channels_last).requires_grad_()
    out = mk.forward_mixupe(layer, kept, target_of(20, num_mixed))
    grad = torch.randn(20, 6, 4, 3).to(memory_format=torch.channels_last)
    out.backward(grad)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert kept.grad.is_contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    expected = mk.forward_mixupe(layer, x, target_of(20, num_mixed))
    expected.backward(grad.contiguous())
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(kept.grad, x.grad)


@pytest.mark.parametrize(
    "stride",
    [
        lambda x: x.repeat(1, 1, 2, 1)[:, :, ::2],
        lambda x: x.repeat_interleave(2, 0)[::2],
        lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
        lambda x: x[:, :, :1].expand(20, 6, 4, 3),
        lambda x: x.repeat(1, 1, 1, 2).to(memory_format=torch.channels_last)[..., ::2],
        lambda x: torch.randn(1, 6, 1, 1).expand(20, 6, 4, 3) + x,
    ],
)
@pytest.mark.parametrize("strided", ["x", "grad", "parameters"])
def test_strided_memory(stride, strided):
    layer, x, grad = randomised(nn.BatchNorm2d(6)), stride(torch.randn(20, 6, 4, 3)), torch.randn(20, 6, 4, 3)
    mk.split_batch_norm(layer)
    results = []
    for change in (lambda tensor: tensor, lambda tensor: tensor.contiguous()):
        rows = x if strided == "x" else x.contiguous()
        rows = change(rows.detach()).requires_grad_()
        values = {name: value.detach() for name, value in layer.state_dict().items()}
        if strided == "parameters":
            values = {
                name: change(value.repeat_interleave(2)[::2]) if value.dim() else value
                for name, value in values.items()
            }
        upstream = change(stride(grad)) if strided == "grad" else grad

        def call(rows, values=values):
            return torch.func.functional_call(layer, values, rows)

        out = mk.forward_mixupe(call, rows, target_of(20, 14))
        results.append((out, *torch.autograd.grad(out, rows, upstream), values["running_var"]))
    torch.testing.assert_close(*results)


class Checkpointed(nn.Module):
    """``network`` with its inner block, or all of it, under checkpoints; a frozen layer above asks for inputs' gradients."""

    def __init__(self, model, reentrant, nested):
        super().__init__()
        self.model, self.reentrant, self.nested = model, reentrant, nested

    def block(self, x):
        for layer in self.model[:3]:
            x = layer(x)
        return checkpoint(self.model[3], x, use_reentrant=self.reentrant) if self.nested else self.model[3](x)

    def forward(self, x):
        return self.model[4:](checkpoint(self.block, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("num_mixed", [0, 14, 20])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, nested, num_mixed):
    plain = mk.split_batch_norm(network())
    model = copy.deepcopy(plain)
    wrapped = Checkpointed(model, reentrant, nested)
    for rows in (20, 30):
        x = torch.randn(rows, 3, 6, 6, requires_grad=True)
        target = target_of(rows, num_mixed)
        torch.testing.assert_close(step(wrapped, model, x, target), step(plain, plain, x, target))
        running = [name for name, _ in model.named_buffers() if "running" in name]
        if num_mixed == 14:
            torch.testing.assert_close(statistics(model), statistics(plain))
        for name in running:
            torch.testing.assert_close(model.get_buffer(name), plain.get_buffer(name))


def test_checkpoints_of_two_batches_that_await_their_backward():
    plain = mk.split_batch_norm(network())
    model = copy.deepcopy(plain)
    wrapped = Checkpointed(model, False, False)
    batches = [images(20, 14), images(30, 5)]
    for call in (plain, wrapped):
        losses = [mk.mixupe_loss(mk.forward_mixupe(call, x, target), target, eta=0.1) for x, target in batches]
        sum(losses).backward()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


def test_compiles_for_changing_batches(compiled):
    plain = mk.split_batch_norm(network())
    model = copy.deepcopy(plain)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(model, fullgraph=True, backend=counter)
    for rows, num_mixed in [(20, 14), (30, 21), (33, 32), (50, 9), (80, 3)]:
        x, target = images(rows, num_mixed)
        torch.testing.assert_close(step(call, model, x, target), step(plain, plain, x, target))
        torch.testing.assert_close(statistics(model), statistics(plain))
    with torch.no_grad():
        torch.testing.assert_close(call(x), plain(x))
    torch.testing.assert_close(statistics(model), statistics(plain))
    assert counter.frame_count <= 4  # the first size, any size, one clean row, evaluation


def test_compiled_calls_must_be_told(compiled):
    call = compiled(mk.split_batch_norm(network()))
    with pytest.raises(Exception, match=r"write forward_mixupe\(model, x, target\)"):
        call(images()[0])


@pytest.mark.parametrize("reentrant", [False, True])
def test_compiles_with_checkpoints(compiled, reentrant):
    plain = mk.split_batch_norm(network())
    model = copy.deepcopy(plain)
    call = compiled(Checkpointed(model, reentrant, False))
    x, target = images()
    torch.testing.assert_close(step(call, model, x, target), step(plain, plain, x, target))


def test_compiles_a_whole_step(compiled):
    plain = mk.split_batch_norm(network())
    model, (x, target) = copy.deepcopy(plain), images()
    loss = compiled(lambda x, target: mk.mixupe_loss(mk.forward_mixupe(model, x, target), target, eta=0.1))(x, target)
    torch.testing.assert_close(loss, mk.mixupe_loss(mk.forward_mixupe(plain, x, target), target, eta=0.1))
    with pytest.raises(RuntimeError, match="write forward_mixupe"):
        model(x)


def test_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = mk.split_batch_norm(network())
        model, (x, target) = copy.deepcopy(plain), images()
        wrapped = nn.parallel.DistributedDataParallel(model)
        torch.testing.assert_close(step(wrapped, model, x, target), step(plain, plain, x, target))
        torch.testing.assert_close(statistics(model), statistics(plain))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("use_buffers", [False, True])
def test_averaged_models_and_update_bn(use_buffers):
    model = mk.split_batch_norm(network())
    averaged = AveragedModel(model, use_buffers=use_buffers)
    for _ in range(2):
        x, target = images()
        step(model, model, x, target)
        averaged.update_parameters(model)
    data = [torch.randn(16, 3, 6, 6) for _ in range(4)]
    update_bn(data, averaged)
    with torch.no_grad():
        hidden = averaged.module[0](torch.cat(data))
    torch.testing.assert_close(averaged.module[1].running_mean, hidden.mean([0, 2, 3]))
    assert averaged.eval()(x).shape == (20, 5)


@pytest.mark.parametrize("make", [mk.Mixup, lambda: mk.MixupE(regularize="mixed")])
def test_without_clean_rows_update_bn_sets_the_statistics(make):
    model, mixer = mk.split_batch_norm(network()), make()
    model[1].momentum = 0.3
    data, labels = torch.randn(512, 3, 6, 6), torch.randint(5, (512,))
    for _ in range(12):
        x, target = mixer(data, labels)
        with torch.no_grad():
            mk.forward_mixupe(model, x, target)
    with torch.no_grad():
        clean = model[0](data).var([0, 2, 3])
    assert 0.5 < (model[1].running_var / clean).mean() < 0.85  # mixed rows: 2/3 of the variance
    update_bn(data.split(128), model)
    torch.testing.assert_close(model[1].running_var, clean, rtol=0.02, atol=0)


def test_manifold_mixup_tells_the_layers():
    model = nn.Sequential(
        nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Linear(7, 7), nn.BatchNorm1d(7), nn.Linear(7, 5)
    ).double()
    plain = copy.deepcopy(model)
    x, labels = torch.randn(24, 6).double(), torch.randint(5, (24,))
    mixer = mk.MixupE(clean_fraction=1 / 3, generator=torch.Generator().manual_seed(3))
    draw = mk.MixupE(clean_fraction=1 / 3, generator=torch.Generator().manual_seed(3)).draw(labels)
    logits, target = mk.ManifoldMixup(mk.split_batch_norm(model), ["2"], mixer)(x, labels)
    hidden = mixer.apply(draw, plain[:3](x))
    hidden = torch.cat([copy.deepcopy(plain[3])(hidden[: target.num_mixed]), plain[3](hidden[target.num_mixed :])])
    torch.testing.assert_close(logits, plain[4](hidden))
    torch.testing.assert_close(statistics(model), statistics(plain))


@pytest.mark.parametrize("reentrant", [False, True])
def test_manifold_mixup_under_checkpoints(reentrant):
    plain = mk.split_batch_norm(network())
    model = copy.deepcopy(plain)
    x, labels = torch.randn(16, 3, 6, 6, requires_grad=True), torch.randint(5, (16,))
    for call, prefix in ((plain, ""), (Checkpointed(model, reentrant, False), "model.")):
        mixer = mk.MixupE(clean_fraction=1 / 2, generator=torch.Generator().manual_seed(3))
        logits, target = mk.ManifoldMixup(call, [f"{prefix}3.0"], mixer)(x, labels)
        mk.mixupe_loss(logits, target, eta=0.1).backward()
    for ours, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
    torch.testing.assert_close(statistics(model), statistics(plain))
    with pytest.raises(RuntimeError, match="write forward_mixupe"):
        model(x)
