"""split_batch_norm and forward_mixupe: rows of two kinds normalised apart, and which rows are which."""

import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import mixupe_kernels as mk
from mixupe_kernels.ops import normalising

from .networks import batch, images, network, randomised, statistics, step, target_of

SIZES = {nn.BatchNorm1d: (5,), nn.BatchNorm2d: (4, 3), nn.BatchNorm3d: (2, 3, 2)}


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


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_copies_no_activation(backend):
    layer, x = mk.split_batch_norm(nn.BatchNorm2d(4)), torch.randn(10, 4, 3, 3, requires_grad=True)
    grad = torch.randn(10, 4, 3, 3)
    with mk.use_backend(backend), Operators(4 * 4 * 9) as operators:
        out = mk.forward_mixupe(layer, x, target_of(10, 6))
        assert operators.names == ["mixupe::normalise_apart"]
        out.backward(grad)
    assert operators.names[1:] == ["mixupe::normalise_apart_backward"]


def test_the_reference_writes_into_parts_of_the_output():
    x = torch.randn(10, 4, 3, 3)
    with Operators(4 * 4 * 9) as operators:
        normalising.normalise_apart(x, None, None, 6, 0.1, 1e-5, running_mean=None, running_var=None)
    assert operators.names == [
        "aten::empty_like",
        "aten::new_empty",
        "aten::new_empty",
    ]  # the output and its statistics


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
