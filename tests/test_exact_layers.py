"""The gradient of the accurate q through every layer of torch.nn, compared with finite differences in float64."""

import math

import pytest
import torch
from torch import nn

import mixupe_kernels as mk

CHANNELS = {1: (2, 6), 2: (2, 4, 4), 3: (2, 4, 4, 4)}  # of the layers of 1, 2 and 3 dimensions


def _dimensions(name):
    return next((int(end[0]) for end in (name[-2:],) if end[1:] == "d" and end[0] in "123"), 0)


# Layer → arguments, and the shape of a sample, where they are not those below.
ARGUMENTS = {
    "AdaptiveAvgPool": (2,),
    "AdaptiveMaxPool": (2,),
    "AvgPool": (2,),
    "BatchNorm": (2,),
    "CircularPad": (1,),
    "ConstantPad": (1, 0.5),
    "Conv": (2, 3, 2),
    "ConvTranspose": (2, 3, 2),
    "FractionalMaxPool": (2, 2),
    "InstanceNorm": (2, 1e-5, 0.1, True, True),
    "LPPool": (2.0, 2),
    "LazyBatchNorm": (),
    "LazyConv": (3, 2),
    "LazyConvTranspose": (3, 2),
    "LazyInstanceNorm": (),
    "MaxPool": (2,),
    "ReflectionPad": (1,),
    "ReplicationPad": (1,),
    "ZeroPad": (1,),
}
OTHERS = {
    "ChannelShuffle": ((2,), (4, 2, 2)),
    "CrossMapLRN2d": None,  # refused, see below
    "Flatten": ((), (2, 3)),
    "Fold": (((3, 3), 2), (8, 4)),
    "GRU": ((4, 3, 1, True, True), (2, 4)),
    "GroupNorm": ((2, 4), (4, 2)),
    "LSTM": ((4, 3, 1, True, True), (2, 4)),
    "LayerNorm": (((2, 3),), (2, 3)),
    "LazyLinear": ((3,), (4,)),
    "Linear": ((4, 3), (4,)),
    "LocalResponseNorm": ((2,), (3, 2)),
    "PixelShuffle": ((2,), (4, 2, 2)),
    "PixelUnshuffle": ((2,), (1, 4, 4)),
    "RMSNorm": ((6,), (6,)),
    "RNN": ((4, 3, 1, "tanh", True, True), (2, 4)),
    "Softmax": ((-1,), (6,)),
    "LogSoftmax": ((-1,), (6,)),
    "Softmin": ((-1,), (6,)),
    "Softmax2d": ((), (2, 2, 2)),
    "SyncBatchNorm": ((2,), (2, 3)),
    "Threshold": ((0.1, 0.5), (6,)),
    "TransformerDecoderLayer": ((4, 2, 6, 0.0, "relu", 1e-5, True), (2, 4)),
    "TransformerEncoderLayer": ((4, 2, 6, 0.0, "relu", 1e-5, True), (2, 4)),
    "Unflatten": ((1, (2, 3)), (6,)),
    "Unfold": ((2,), (2, 3, 3)),
    "Upsample": ((None, 2), (2, 4)),
    "UpsamplingBilinear2d": ((None, 2), (1, 3, 3)),
    "UpsamplingNearest2d": ((None, 2), (1, 3, 3)),
    # Layers of another number of inputs, as one of one input.
    "Bilinear": ((2, 3, 4), (5,)),
    "CosineSimilarity": ((), (6,)),
    "EmbeddingBag": None,  # of ids, which have no mean to move to
    "Embedding": None,
    "GRUCell": ((4, 3), (4,)),
    "LSTMCell": ((4, 3), (4,)),
    "MaxUnpool1d": ((2,), (2, 6)),
    "MaxUnpool2d": ((2,), (2, 4, 4)),
    "MaxUnpool3d": ((2,), (2, 4, 4, 4)),
    "MultiheadAttention": ((4, 2, 0.0, True, False, False, None, None, True), (3, 4)),
    "PairwiseDistance": ((), (6,)),
    "RNNCell": ((4, 3), (4,)),
    "Transformer": ((4, 2, 1, 1, 6, 0.0, "relu", None, None, 1e-5, True), (2, 4)),
    "TransformerDecoder": None,  # a container
    "TransformerEncoder": None,
}
CALLS = {
    "Bilinear": lambda layer, x: layer(x[:, :2], x[:, 2:]),
    "CosineSimilarity": lambda layer, x: layer(x[:, :3], x[:, 3:]),
    "MultiheadAttention": lambda layer, x: layer(x, x, x)[0],
    "PairwiseDistance": lambda layer, x: layer(x[:, :3], x[:, 3:]),
    "Transformer": lambda layer, x: layer(x, x.flip(1)),
    "TransformerDecoderLayer": lambda layer, x: layer(x, x.flip(1)),
    **{
        f"MaxUnpool{d}d": lambda layer, x, d=d: layer(
            *getattr(nn.functional, f"max_pool{d}d")(x, 2, return_indices=True)
        )
        for d in (1, 2, 3)
    },
}
BASES = ("Container", "Module", "RNNBase", "RNNCellBase", "DataParallel", "Sequential")


def is_layer(name, value):
    if not isinstance(value, type) or not issubclass(value, nn.Module) or name in BASES:
        return False
    return "Loss" not in name and not name.endswith(("List", "Dict"))


LAYERS = [
    name for name, value in sorted(vars(nn).items()) if is_layer(name, value) and OTHERS.get(name, ()) is not None
]


def arguments_of(name):
    if name in OTHERS:
        return OTHERS[name]
    dimensions = _dimensions(name)
    if dimensions:
        return ARGUMENTS.get(name[:-2], ()), CHANNELS[dimensions]
    return (), (6,)  # activations


class Net(nn.Module):
    def __init__(self, name):
        super().__init__()
        arguments, self.shape = arguments_of(name)
        self.layer = getattr(nn, name)(*arguments)
        self.call = CALLS.get(name, lambda layer, x: layer(x))
        self.front = nn.Linear(5, math.prod(self.shape))
        self.head = nn.LazyLinear(3)

    def forward(self, x):
        hidden = self.call(self.layer, 2 * torch.tanh(self.front(x)).view(-1, *self.shape))
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        return self.head(torch.tanh(hidden).reshape(len(x), -1))


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_through_every_layer(name):
    for train in (True, False):
        net = Net(name).double()
        x, x_mean = torch.randn(3, 5, dtype=torch.double), torch.randn(5, dtype=torch.double)
        net(x)
        net.train(train)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.normal_(std=0.6)
        labels = torch.tensor([0, 2, 1])
        start = {key: value.detach().clone() for key, value in net.named_parameters()}
        buffers = dict(net.named_buffers())

        def q_of(parameters, net=net, x=x, x_mean=x_mean, labels=labels, buffers=buffers):
            torch.manual_seed(1)  # dropout
            state = {**parameters, **{key: value.clone() for key, value in buffers.items()}}
            return mk.exact_q(lambda inputs: torch.func.functional_call(net, state, (inputs,)), x, labels, x_mean)

        parameters = {key: value.clone().requires_grad_() for key, value in start.items()}
        upstream = torch.randn(3, dtype=torch.double)
        gradients = torch.autograd.grad(q_of(parameters) @ upstream, list(parameters.values()), allow_unused=True)
        along = {key: torch.randn_like(value) for key, value in start.items()}
        ours = sum((g * v).sum() for g, v in zip(gradients, along.values(), strict=True) if g is not None)
        step = 1e-6
        with torch.no_grad():
            above, below = (q_of({k: v + s * along[k] for k, v in start.items()}) @ upstream for s in (step, -step))
        torch.testing.assert_close(ours, (above - below) / (2 * step), rtol=1e-5, atol=1e-6)
        assert ours != 0


class Determinant(nn.Module):
    def forward(self, x):
        return x * torch.linalg.det(x.view(-1, 2, 2) + 3 * torch.eye(2, dtype=x.dtype)).unsqueeze(1)


class Solved(nn.Module):
    def forward(self, x):
        return torch.linalg.solve(x.view(-1, 2, 2) + 3 * torch.eye(2, dtype=x.dtype), x[:, :2])


class OwnNorm(nn.Module):
    def forward(self, x):
        return torch.layer_norm(x, (4,))


class OwnBatchNorm(nn.Module):
    def forward(self, x):
        return torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)


@pytest.mark.parametrize(
    "layer",
    [
        Determinant(),
        Solved(),
        OwnNorm(),
        OwnBatchNorm(),
        nn.Sequential(nn.Unflatten(1, (4, 1, 1)), nn.CrossMapLRN2d(2)),
    ],
)
def test_what_would_have_a_wrong_gradient_is_refused(layer):
    model = nn.Sequential(nn.Linear(5, 4), layer, nn.Flatten(), nn.LazyLinear(3)).double()
    x, labels = torch.randn(3, 5, dtype=torch.double), torch.tensor([0, 2, 1])
    model(x)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"model must not call|forward AD|jvp"):
        mk.exact_q(model, x, labels, torch.zeros(5))


def test_a_scripted_norm_is_refused_with_a_gradient_and_right_without():
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    scripted = torch.jit.trace(model, torch.randn(2, 5, dtype=torch.double))
    x, labels, x_mean = torch.randn(3, 5, dtype=torch.double), torch.tensor([0, 2, 1]), torch.zeros(5)
    with pytest.raises(NotImplementedError, match="model must not call aten.native_layer_norm"):
        mk.exact_q(scripted, x, labels, x_mean)
    expected = mk.exact_q(model, x, labels, x_mean)
    with torch.no_grad():
        torch.testing.assert_close(mk.exact_q(scripted, x, labels, x_mean), expected)
