"""split_batch_norm and forward_mixupe: rows of two kinds normalised apart, wherever a model with BatchNorm may run."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mixupe_kernels as mk

SIZES = {nn.BatchNorm1d: (5,), nn.BatchNorm2d: (4, 3), nn.BatchNorm3d: (2, 3, 2)}


def target_of(rows, num_mixed):
    labels = torch.arange(rows) % 5
    return mk.MixedTarget(labels, labels.flip(0), torch.rand(rows), num_mixed, rows - num_mixed, 0.5)


def batch(**options):
    x, labels = torch.randn(24, 6, dtype=torch.float64), torch.randint(5, (24,))
    return mk.MixupE(alpha=1.0, **options)(x, labels)


def randomised(norm):
    """A layer whose parameters and statistics are not those it starts with."""
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if tensor is not None:
                tensor.uniform_(0.5, 1.5)
    return norm


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def images(rows=20, num_mixed=14):
    return torch.randn(rows, 3, 6, 6), target_of(rows, num_mixed)


def statistics(model):
    return [buffer.clone() for buffer in model.buffers()]


def step(call, model, x, target):
    """Logits and the gradients of one loss; ``call`` may wrap the model."""
    model.zero_grad()
    logits = mk.forward_mixupe(call, x, target)
    mk.MixupELoss(eta=0.5)(logits, target).backward()
    return logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]


# --- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
@pytest.mark.parametrize("cls", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
def test_each_kind_is_normalised_by_itself_and_clean_rows_are_tracked(cls, momentum, affine, track):
    layer = randomised(cls(6, momentum=momentum, affine=affine, track_running_stats=track).double())
    parts = copy.deepcopy(layer), copy.deepcopy(layer)
    mk.split_batch_norm(layer)
    for _ in range(3):
        x = torch.randn(11, 6, *SIZES[cls], dtype=torch.float64) * 3 + 1
        inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
        ours = mk.forward_mixupe(layer, inputs[0], target_of(11, 7))
        by_parts = torch.cat([parts[0](inputs[1][:7]), parts[1](inputs[1][7:])])
        torch.testing.assert_close(ours, by_parts)
        grad = torch.randn_like(ours)
        ours.backward(grad)
        by_parts.backward(grad)
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(parts[1].named_buffers()))
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(parameter.grad, sum(part.get_parameter(name).grad for part in parts))


def test_formula():
    layer = mk.split_batch_norm(nn.BatchNorm1d(6, momentum=0.3, eps=0.01).double())
    x, target = batch(clean_fraction=1 / 3)
    mixed, clean = x[: target.num_mixed], x[target.num_mixed :]
    expected = [(rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 0.01).sqrt() for rows in (mixed, clean)]
    torch.testing.assert_close(mk.forward_mixupe(layer, x, target), torch.cat(expected))
    torch.testing.assert_close(layer.running_mean, 0.3 * clean.mean(0))
    torch.testing.assert_close(layer.running_var, 0.7 + 0.3 * clean.var(0))
    assert layer.num_batches_tracked == 1


@pytest.mark.parametrize("bias", [True, False])
def test_derivatives(bias):
    layer = randomised(nn.BatchNorm2d(2, track_running_stats=False).double())
    if not bias:
        layer.bias = None
    mk.split_batch_norm(layer)
    x, target = torch.randn(5, 2, 2, 1, dtype=torch.float64, requires_grad=True), target_of(5, 3)
    names = [name for name, _ in layer.named_parameters()]

    def function(x, *values):
        arguments = dict(zip(names, values, strict=True))
        return mk.forward_mixupe(lambda rows: torch.func.functional_call(layer, arguments, rows), x, target)

    inputs = (x, *layer.parameters())
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_transforms_of_torch_func():
    layer = randomised(nn.BatchNorm1d(2, track_running_stats=False).double())
    mk.split_batch_norm(layer)
    x, target = torch.randn(5, 2, dtype=torch.float64), target_of(5, 3)

    def loss(x):
        return mk.forward_mixupe(layer, x, target).pow(3).sum()

    torch.testing.assert_close(torch.func.grad(loss)(x), torch.autograd.functional.jacobian(loss, x))
    torch.testing.assert_close(torch.func.hessian(loss)(x), torch.autograd.functional.hessian(loss, x))
    batches = torch.stack([x, 2 * x.flip(1)])
    each = torch.func.vmap(lambda x: mk.forward_mixupe(layer, x, target))(batches)
    torch.testing.assert_close(each, torch.stack([mk.forward_mixupe(layer, x, target) for x in batches]))


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_gradients_that_nobody_wants(frozen):
    layer, x = mk.split_batch_norm(randomised(nn.BatchNorm1d(3))), torch.randn(9, 3, requires_grad=True)
    tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
    weights = torch.randn(9, 3)
    (mk.forward_mixupe(layer, x, target_of(9, 5)) * weights).sum().backward()
    expected = {name: tensor.grad.clone() for name, tensor in tensors.items() if name != frozen}
    for tensor in tensors.values():
        tensor.grad = None
    tensors[frozen].requires_grad_(False)
    (mk.forward_mixupe(layer, x, target_of(9, 5)) * weights).sum().backward()
    torch.testing.assert_close({name: tensors[name].grad for name in expected}, expected)
    assert tensors[frozen].grad is None


def test_exact_q_of_a_converted_model():
    plain = network().double()
    split = mk.split_batch_norm(copy.deepcopy(plain))
    x, mean, labels = torch.randn(9, 3, 6, 6).double(), torch.zeros(3, 6, 6), torch.arange(9) % 5
    with pytest.raises(RuntimeError, match="write forward_mixupe"):
        mk.exact_q(split, x, labels, mean)
    ours = mk.exact_q(lambda rows: mk.forward_mixupe(split, rows, None), x, labels, mean)
    expected = mk.exact_q(plain, x, labels, mean)
    torch.testing.assert_close(ours, expected)
    for one, two in zip(
        torch.autograd.grad(ours.sum(), split.parameters(), allow_unused=True),
        torch.autograd.grad(expected.sum(), plain.parameters(), allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_exact_q_through_rows_of_two_kinds():
    model = mk.split_batch_norm(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5)).double())
    x, target = torch.randn(9, 4).double(), target_of(9, 5)
    parameters = list(model.parameters())

    def q(*values):
        named = dict(zip(dict(model.named_parameters()), values, strict=True))

        def call(rows):
            return mk.forward_mixupe(lambda rows: torch.func.functional_call(model, named, rows), rows, target)

        return mk.exact_q(call, x, target.labels, torch.zeros(4)).sum()

    assert torch.autograd.gradcheck(q, parameters)


class Operators(TorchDispatchMode):
    """Names of the operators that returned a tensor of ``numel`` elements in memory of its own."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        new = not any(value.alias_info for value in func._schema.returns)
        if new and any(isinstance(value, torch.Tensor) and value.numel() >= self.numel for value in (out, *args)):
            self.names.append(func._schema.name)
        return out


def test_copies_no_activation():
    layer, x = mk.split_batch_norm(nn.BatchNorm2d(4)), torch.randn(10, 4, 3, 3, requires_grad=True)
    with Operators(4 * 4 * 9) as operators:
        mk.forward_mixupe(layer, x, target_of(10, 6))
    assert operators.names == ["aten::empty_like"]  # the output; native_batch_norm writes into its parts


def test_first_layer_learns_the_variance_of_clean_inputs():
    torch.manual_seed(1)
    data, labels = torch.randn(1024, 3, 4, 4) * 2 + 1, torch.randint(5, (1024,))
    mixer, criterion = mk.MixupE(alpha=1.0, clean_fraction=1 / 4), mk.MixupELoss(eta=1e-3)
    ratios = []
    for convert in (mk.split_batch_norm, lambda model: model):
        model = convert(network())
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for index in range(70):
            optimizer.param_groups[0]["lr"] = 0.05 if index < 30 else 1e-4
            rows = torch.randint(1024, (256,))
            x, target = mixer(data[rows], labels[rows])
            optimizer.zero_grad()
            criterion(mk.forward_mixupe(model, x, target), target).backward()
            optimizer.step()
        with torch.no_grad():
            clean = model[0](data).var([0, 2, 3])
        ratios.append((model[1].running_var / clean).mean().item())
    assert abs(ratios[0] - 1) < 0.02
    assert (
        abs(ratios[1] - (4 * 2 / 3 + 1) / 5) < 0.05
    )  # rows together: 4 mixed rows of 2/3 of the variance to one clean row


# --- which rows are which -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["clean", "no target", "mixed", "no_grad"])
def test_rows_of_one_kind_are_batch_norm(kind):
    plain = randomised(nn.BatchNorm2d(3))
    split = mk.split_batch_norm(copy.deepcopy(plain))
    x = torch.randn(6, 3, 2, 2)
    target = {"clean": target_of(6, 0), "mixed": target_of(6, 6)}.get(kind)
    if kind == "no_grad":
        with torch.no_grad():
            ours = split(x)
    else:
        ours = mk.forward_mixupe(split, x, target)
    torch.testing.assert_close(ours, plain(x), rtol=0, atol=0)
    torch.testing.assert_close(statistics(split), statistics(plain), rtol=0, atol=0)


def test_evaluation_is_batch_norm():
    plain = network()
    split = mk.split_batch_norm(copy.deepcopy(plain))
    x, target = images()
    step(split, split, x, target)
    plain.load_state_dict(split.state_dict())
    before = statistics(split)
    split.eval(), plain.eval()
    torch.testing.assert_close(split(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(mk.forward_mixupe(split, x, target), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(statistics(split), before, rtol=0, atol=0)


def test_frozen_layers_stay_frozen():
    model = mk.split_batch_norm(network())
    model[1].eval()
    before = statistics(model[1])
    x, target = images()
    logits = mk.forward_mixupe(model, x, target)
    torch.testing.assert_close(statistics(model[1]), before, rtol=0, atol=0)
    assert model[3][1].num_batches_tracked == 1
    model[3][1].eval()
    assert not torch.equal(logits, mk.forward_mixupe(model, x, target))


def test_forgetting_forward_mixupe_raises_and_changes_nothing():
    model = mk.split_batch_norm(network())
    x, target = images()
    for told_before in (False, True):
        if told_before:
            mk.forward_mixupe(model, x, target)
        before = statistics(model)
        with pytest.raises(RuntimeError, match=r"write forward_mixupe\(model, x, target\) instead of model\(x\)"):
            model(x)
        torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


def test_an_error_of_the_model_ends_what_was_told():
    model = mk.split_batch_norm(network())
    with pytest.raises(RuntimeError, match="channels"):
        mk.forward_mixupe(model, torch.randn(20, 4, 6, 6), target_of(20, 14))
    with pytest.raises(RuntimeError, match="write forward_mixupe"):
        model(images()[0])


def test_a_layer_may_see_each_row_several_times():
    layer = nn.BatchNorm1d(3)
    model = mk.split_batch_norm(nn.Sequential(nn.Flatten(0, 1), copy.deepcopy(layer)))
    x = torch.randn(6, 4, 3)
    expected = [copy.deepcopy(layer)(rows.flatten(0, 1)) for rows in (x[:4], x[4:])]
    torch.testing.assert_close(mk.forward_mixupe(model, x, target_of(6, 4)), torch.cat(expected))
    with pytest.raises(
        ValueError, match="must see the 6 rows that forward_mixupe was given, or a multiple of them, got 8"
    ):
        mk.forward_mixupe(lambda x: model[1](x[:2].flatten(0, 1)), x, target_of(6, 4))


@pytest.mark.parametrize("num_mixed, kind", [(1, "mixed"), (5, "clean")])
def test_one_value_per_channel_is_refused(num_mixed, kind):
    layer = mk.split_batch_norm(nn.BatchNorm1d(3))
    with pytest.raises(
        ValueError, match=f"more than 1 value per channel of each kind of rows in training, got 1 {kind}"
    ):
        mk.forward_mixupe(layer, torch.randn(6, 3), target_of(6, num_mixed))
    assert layer.num_batches_tracked == 0
    assert mk.forward_mixupe(
        mk.split_batch_norm(nn.BatchNorm1d(3)), torch.randn(6, 3, 2), target_of(6, num_mixed)
    ).shape


def test_input_of_the_wrong_dimension_is_refused():
    with pytest.raises(ValueError, match="expected 4D input"):
        mk.forward_mixupe(mk.split_batch_norm(nn.BatchNorm2d(3)), torch.randn(6, 3), target_of(6, 4))


def test_threads_train_models_of_their_own():
    expected, got, barrier = {}, {}, threading.Barrier(2)
    models = {num_mixed: mk.split_batch_norm(network()) for num_mixed in (4, 15)}
    x = images()[0]
    for num_mixed, model in models.items():
        expected[num_mixed] = mk.forward_mixupe(copy.deepcopy(model), x, target_of(20, num_mixed)).detach()

    def train(num_mixed):
        def call(rows):
            barrier.wait()  # both are within forward_mixupe
            logits = models[num_mixed](rows)
            barrier.wait()
            return logits

        got[num_mixed] = mk.forward_mixupe(call, x, target_of(20, num_mixed)).detach()

    threads = [threading.Thread(target=train, args=(num_mixed,)) for num_mixed in models]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_data_parallel_is_refused_over_several_devices():
    plain, (x, target) = network(), images()
    for model in (nn.DataParallel(plain), nn.DataParallel(mk.split_batch_norm(copy.deepcopy(plain)))):
        assert mk.forward_mixupe(model, x, target).shape == (20, 5)  # on the CPU: no replicas
    model.device_ids = [0, 1]
    with pytest.raises(TypeError, match="model must be a DistributedDataParallel"):
        mk.forward_mixupe(model, x, target)


# --- the conversion -------------------------------------------------------------------------------------------------


def test_conversion_changes_the_class_and_nothing_else():
    model = network()
    names = list(model.state_dict())
    parameters, buffers = list(model.parameters()), list(model.buffers())
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    assert mk.split_batch_norm(model) is model and mk.split_batch_norm(model) is model
    assert list(model.state_dict()) == names
    assert all(one is two for one, two in zip(model.parameters(), parameters, strict=True))
    assert all(one is two for one, two in zip(model.buffers(), buffers, strict=True))
    assert isinstance(model[1], nn.BatchNorm2d) and repr(model[1]).startswith("SplitBatchNorm2d(8, eps=1e-05")
    before = model[1].weight.detach().clone()
    step(model, model, *images())
    optimizer.step()
    assert calls and not torch.equal(before, model[1].weight)


def test_state_dict_goes_both_ways():
    plain, split = network(), mk.split_batch_norm(network())
    step(split, split, *images())
    plain.load_state_dict(split.state_dict(), strict=True)
    torch.testing.assert_close(statistics(plain), statistics(split))
    plain(images()[0])
    split.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(statistics(plain), statistics(split))
    assert split.state_dict()._metadata == plain.state_dict()._metadata


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, copy.copy, saved, lambda model: pickle.loads(pickle.dumps(model, 0))]
)
def test_copies_are_converted(copied):
    model = mk.split_batch_norm(network())
    x, target = images()
    step(model, model, x, target)
    twin = copied(model)
    torch.testing.assert_close(mk.forward_mixupe(twin, x, target), mk.forward_mixupe(model, x, target))
    assert type(twin[1]) is type(model[1])
    with pytest.raises(RuntimeError, match="write forward_mixupe"):
        twin(x)


class Renamed(nn.BatchNorm2d):
    """A subclass that keeps its forward."""

    extra = 1


class Activated(nn.BatchNorm2d):
    """A subclass whose forward does more."""

    def forward(self, x):
        return F.relu(super().forward(x))


def test_subclass_that_keeps_its_forward():
    layer = mk.split_batch_norm(Renamed(3))
    assert isinstance(layer, Renamed) and layer.extra == 1
    x, target = torch.randn(8, 3, 2, 2), target_of(8, 5)
    expected = torch.cat([nn.BatchNorm2d(3)(x[:5]), nn.BatchNorm2d(3)(x[5:])])
    torch.testing.assert_close(mk.forward_mixupe(pickle.loads(pickle.dumps(layer)), x, target), expected)


@pytest.mark.parametrize(
    "layer, words",
    [
        (Activated(3), "'1', a .*Activated, whose forward is its own"),
        (nn.SyncBatchNorm(3), "'1', a .*SyncBatchNorm: statistics over several processes"),
    ],
)
def test_other_layers_are_refused_by_name(layer, words):
    model = nn.Sequential(nn.BatchNorm2d(3), layer)
    with pytest.raises(TypeError, match=f"model must have layers that split_batch_norm can convert, got {words}"):
        mk.split_batch_norm(model)
    assert type(model[0]) is nn.BatchNorm2d


def test_a_replaced_forward_is_refused():
    model = network()
    model[1].forward = model[1].forward
    with pytest.raises(
        TypeError, match="got '1', .* whose forward was replaced: convert the model before it is wrapped"
    ):
        mk.split_batch_norm(model)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        mk.split_batch_norm(network)


def test_lazy_layers():
    plain = network()
    lazy = copy.deepcopy(plain)
    lazy[1], lazy[3][1] = nn.LazyBatchNorm2d(), nn.LazyBatchNorm2d()
    mk.split_batch_norm(lazy), mk.split_batch_norm(plain)
    x, target = images()
    for _ in range(2):
        torch.testing.assert_close(mk.forward_mixupe(lazy, x, target), mk.forward_mixupe(plain, x, target))
    assert type(lazy[1]) is type(plain[1])


def test_timm_layers():
    timm_layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    layer = timm_layers.BatchNormAct2d(3)
    x, target = torch.randn(8, 3, 2, 2), target_of(8, 5)
    expected = torch.cat([copy.deepcopy(layer)(x[:5]), copy.deepcopy(layer)(x[5:])])
    ours = mk.forward_mixupe(mk.split_batch_norm(layer), x, target)
    torch.testing.assert_close(ours, expected)
    assert ours.min() == 0  # its activation


# --- where it runs --------------------------------------------------------------------------------------------------


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
    torch.testing.assert_close(ours, by_parts, rtol=0, atol=0)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=0)
    torch.testing.assert_close(statistics(layer), statistics(parts[1]), rtol=0, atol=0)


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
    call = compiled(model)
    for rows, num_mixed in [
        (20, 14),
        (30, 21),
        (12, 7),
        (40, 24),
        (9, 5),
        (33, 32),
        (50, 9),
        (60, 7),
        (70, 30),
        (80, 3),
    ]:
        x, target = images(rows, num_mixed)
        torch.testing.assert_close(step(call, model, x, target), step(plain, plain, x, target))
        torch.testing.assert_close(statistics(model), statistics(plain))
    with torch.no_grad():
        torch.testing.assert_close(call(x), plain(x))
    torch.testing.assert_close(statistics(model), statistics(plain))


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


# --- without the conversion -----------------------------------------------------------------------------------------


def gradients(model, x, target, batched):
    model.zero_grad()
    mk.MixupELoss(eta=0.5)(mk.forward_mixupe(model, x, target, batched=batched), target).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("options", [{}, {"clean_fraction": 1 / 3}, {"clean_fraction": 1 / 4, "split": True}])
def test_same_where_rows_are_separate(options):
    model = nn.Sequential(nn.Linear(6, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 5)).double()
    x, target = batch(**options)
    one, two = (mk.forward_mixupe(model, x, target, batched=batched) for batched in (True, False))
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(gradients(model, x, target, True), gradients(model, x, target, False))


@pytest.mark.parametrize(
    "batched, convert", [(True, lambda model: model), (False, lambda model: model), (False, mk.split_batch_norm)]
)
def test_batchnorm_normalises_and_tracks_as_documented(batched, convert):
    momentum = 0.3
    norm = convert(nn.BatchNorm1d(6, momentum=momentum, affine=False).double())
    x, target = batch(clean_fraction=1 / 3)
    logits = mk.forward_mixupe(norm, x, target, batched=batched)
    parts = [x] if batched else [x[: target.num_mixed], x[target.num_mixed :]]
    mean, variance, expected = torch.zeros(6).double(), torch.ones(6).double(), []
    for rows in parts:
        mean = (1 - momentum) * mean + momentum * rows.mean(0)
        variance = (1 - momentum) * variance + momentum * rows.var(0)
        expected.append((rows - rows.mean(0)) / (rows.var(0, unbiased=False) + norm.eps).sqrt())
    torch.testing.assert_close(logits, torch.cat(expected))
    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.num_batches_tracked == len(parts)


def test_running_variance_is_larger_in_two_calls():
    # Features of variance 1: λ = 1/2 halves the mixed rows', and the clean rows enter last, so with more weight.
    one = nn.BatchNorm1d(6).double()
    two = copy.deepcopy(one)
    mixer = mk.MixupE(alpha=1000.0, clean_fraction=1 / 8)
    for _ in range(60):
        x, target = mixer(torch.randn(256, 6, dtype=torch.float64), torch.randint(5, (256,)))
        mk.forward_mixupe(one, x, target)
        mk.forward_mixupe(two, x, target, batched=False)
    assert 0.5 < one.running_var.mean() < 0.62  # (256·½ + 32·1) / 288 = 0.56
    assert 0.7 < two.running_var.mean() < 0.82  # (0.9·½ + 1) / 1.9 = 0.76


def test_rows_of_one_kind_are_one_call():
    calls = []
    x, target = batch(regularize="mixed")
    mk.forward_mixupe(lambda rows: calls.append(len(rows)) or rows, x, target, batched=False)
    assert calls == [24]


def test_bad_arguments():
    x, target = batch()
    with pytest.raises(ValueError, match="x must have shape"):
        mk.forward_mixupe(nn.Identity(), x[1:], target)
    with pytest.raises(TypeError, match="target must be a MixedTarget or None, got Tensor"):
        mk.forward_mixupe(nn.Identity(), x, target.labels)
