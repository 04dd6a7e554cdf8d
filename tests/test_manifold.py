"""Manifold Mixup: hidden states mixed at a layer picked at random, with gradients, and the model left as it was."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mixupe_kernels as mk


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.unused = nn.Linear(1, 1)

    def forward(self, x, scale=1.0):
        hidden = torch.tanh(self.first(x)) * scale
        return self.head(torch.tanh(self.second(hidden)))


def batch():
    return torch.randn(8, 4), torch.randint(3, (8,))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mixed(draw, values):
    rows = torch.arange(len(values)) if draw.rows is None else draw.rows
    lam = draw.lam.expand(len(rows)).unsqueeze(1)
    return lam * values[rows] + (1 - lam) * values[draw.partner]


@pytest.mark.parametrize("layer", ["input", "first", "second"])
@pytest.mark.parametrize(
    "make", [mk.Mixup, mk.MixupE, lambda **options: mk.MixupE(clean_fraction=1 / 2, split=True, **options)]
)
def test_mixes_at_the_layer(layer, make, backend):
    model, (x, labels) = Net(), batch()
    manifold = mk.ManifoldMixup(model, [layer], make(generator=seeded()))
    draw = make(generator=seeded()).draw(labels)
    logits, target = manifold(x, labels)
    assert manifold.layer == layer and logits.shape == (len(target.lam), 3) and target.num_reg == draw.target.num_reg
    hidden = x
    for name in ("first", "second", "head"):
        if layer == {"first": "input"}.get(name):
            hidden = mixed(draw, hidden)
        hidden = getattr(model, name)(hidden)
        if layer == name:
            hidden = mixed(draw, hidden)
        hidden = torch.tanh(hidden) if name != "head" else hidden
    torch.testing.assert_close(logits, hidden)
    expected, ours = (mk.mixupe_loss(z, target, eta=0.3) for z in (hidden, logits))
    parameters = [p for name, p in model.named_parameters() if "unused" not in name]
    for gradient, by_hand in zip(*(torch.autograd.grad(loss, parameters) for loss in (ours, expected)), strict=True):
        torch.testing.assert_close(gradient, by_hand)


def test_layers_are_picked_uniformly_and_by_the_generator():
    model, (x, labels) = Net(), batch()
    names = ["input", "first", "second"]

    def picks(seed, count):
        manifold = mk.ManifoldMixup(model, names, mk.Mixup(), generator=seeded(seed))
        chosen = []
        for _ in range(count):
            manifold(x, labels)
            chosen.append(manifold.layer)
        return chosen

    chosen = picks(0, 300)
    assert all(abs(chosen.count(name) - 100) < 4 * (300 * 2 / 9) ** 0.5 for name in names)
    assert picks(1, 20) == picks(1, 20) != picks(2, 20)


def test_the_model_is_left_as_it_was():
    model, (x, labels) = Net(), batch()
    before = model(x)
    manifold = mk.ManifoldMixup(model, ["first"], mk.Mixup())
    manifold(x, labels)
    assert torch.equal(model(x), before) and not model.first._forward_hooks
    with pytest.raises(RuntimeError):
        manifold(torch.randn(8, 5), labels)  # the forward fails; the hook goes all the same
    assert not model.first._forward_hooks


def test_normalisation_is_for_the_input_whatever_the_layer():
    x, labels = torch.randint(0, 256, (8, 4, 1, 1), dtype=torch.uint8), torch.arange(8)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    options = {"mean": (0.5,) * 4, "std": (0.25,) * 4, "lam_distribution": mk.sampling.Fixed(1.0)}
    expected = model((x.float() / 255 - 0.5) / 0.25)
    for layer in ("input", "0", "1"):
        logits, _ = mk.ManifoldMixup(model, [layer], mk.Mixup(**options))(x, labels)
        torch.testing.assert_close(logits, expected)


def test_several_inputs_token_ids_and_not_enabled():
    model, (x, labels) = Net(), batch()
    for inputs in ((x, 2.0), {"x": x, "scale": 2.0}):
        logits, _ = mk.ManifoldMixup(model, ["second"], mk.Mixup(prob=0.0))(inputs, labels)
        torch.testing.assert_close(logits, model(x, 2.0))
    tokens = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(8, 3))
    logits, target = mk.ManifoldMixup(tokens, ["0"], mk.MixupE())(torch.randint(10, (8, 2)), labels)
    assert logits.shape == (16, 3) and target.num_reg == 8
    fn = mk.MixupE()
    fn.enabled = False
    torch.testing.assert_close(mk.ManifoldMixup(model, ["first"], fn)(x, labels)[0], model(x))


def test_a_module_used_twice_mixes_once():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    x, labels = batch()
    draw = mk.Mixup(generator=seeded()).draw(labels)
    logits, _ = mk.ManifoldMixup(model, ["0"], mk.Mixup(generator=seeded()))(x, labels)
    torch.testing.assert_close(logits, shared(torch.tanh(mixed(draw, shared(x)))))


class Sequences(nn.Module):
    """Outputs that no rows can be mixed of: time first, and a tuple."""

    def __init__(self):
        super().__init__()
        self.recurrent, self.turn = nn.GRU(4, 3), nn.Identity()

    def forward(self, x):
        return self.recurrent(self.turn(x.unsqueeze(0)))[0][0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, y: mk.ManifoldMixup(Net(), [], mk.Mixup()), TypeError, "layers must be a sequence of names"),
        (lambda x, y: mk.ManifoldMixup(Net(), "first", mk.Mixup()), TypeError, "layers must be a sequence of names"),
        (lambda x, y: mk.ManifoldMixup(Net(), ["third"], mk.Mixup()), ValueError, "got 'third'"),
        (lambda x, y: mk.ManifoldMixup(Net(), [1], mk.Mixup()), ValueError, "got 1"),
        (
            lambda x, y: mk.ManifoldMixup(Net().forward, ["first"], mk.Mixup()),
            TypeError,
            "model must be a torch.nn.Module",
        ),
        (lambda x, y: mk.ManifoldMixup(Net(), ["first"], None), TypeError, "mixup_fn must be a Mixup"),
        (lambda x, y: mk.ManifoldMixup(Net(), ["first"], mk.Mixup(cutmix_alpha=1)), ValueError, "neither cutmix_alpha"),
        (lambda x, y: mk.ManifoldMixup(Net(), ["unused"], mk.Mixup())(x, y), RuntimeError, "'unused' did not"),
        (
            lambda x, y: mk.ManifoldMixup(Net(), ["first"], mk.Mixup())(x, None),
            TypeError,
            "labels must be a torch.Tensor",
        ),
        (lambda x, y: mk.ManifoldMixup(Net(), ["first"], mk.Mixup())(x, y[1:]), ValueError, "must have 7 rows"),
        (
            lambda x, y: mk.ManifoldMixup(Sequences(), ["recurrent"], mk.Mixup())(x, y),
            TypeError,
            "must be a torch.Tensor, got tuple",
        ),
        (lambda x, y: mk.ManifoldMixup(Sequences(), ["turn"], mk.Mixup())(x, y), ValueError, "must have 8 rows"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(*batch())


class Blocks(nn.Module):
    """Three blocks, the first two under activation checkpointing of a kind, or none."""

    def __init__(self, use_reentrant=None):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(0.2)) for _ in range(2))
        self.head, self.use_reentrant = nn.Linear(4, 3), use_reentrant

    def forward(self, x):
        for block in (self.first, self.second):
            plain = self.use_reentrant is None
            x = block(x) if plain else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(torch.tanh(x))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("layers", [["first"], ["first.0"], ["second.1"], ["first", "second"]])
def test_activation_checkpointing_gives_the_same_gradients(use_reentrant, layers):
    plain, checkpointed = Blocks(), Blocks(use_reentrant)
    checkpointed.load_state_dict(plain.state_dict())
    gradients = []
    for model in (plain, checkpointed):
        torch.manual_seed(1)
        manifold = mk.ManifoldMixup(
            model, layers, mk.MixupE(generator=seeded(), clean_fraction=1 / 2), generator=seeded(3)
        )
        loss = torch.zeros(())
        for _ in range(4):  # graphs in one backward pass
            x, labels = torch.randn(8, 4, requires_grad=True), torch.randint(3, (8,))
            loss = loss + mk.mixupe_loss(*manifold(x, labels), eta=0.3)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert not any(module._forward_hooks for module in model.modules())
        assert not mk.batch.manifold._Mixing.recomputed
    for ours, expected in zip(*reversed(gradients), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_backward_pass_that_fails_leaves_the_model_unmixed():
    model, (x, labels) = Blocks(False).eval(), batch()
    expected = model(x)
    logits, _ = mk.ManifoldMixup(model, ["first"], mk.Mixup())(x, labels)

    def fail(_):
        raise RuntimeError("failed here")

    model.head.weight.register_hook(fail)
    with pytest.raises(RuntimeError, match="failed here"):
        logits.sum().backward()
    assert torch.equal(model(x), expected) and not model.first._forward_hooks


def test_a_recomputed_module_that_is_used_twice_is_refused():
    model = Blocks(False)
    model.second = model.first
    logits, _ = mk.ManifoldMixup(model, ["first"], mk.Mixup())(*batch())
    with pytest.raises(RuntimeError, match="layers must not name a module that is used more than once and recomputed"):
        logits.sum().backward()


@pytest.mark.parametrize("how", ["wrapped", "in place", "a part", "the layer"])
@pytest.mark.parametrize("called_before", [False, True])
def test_a_compiled_model_is_mixed(how, called_before):
    plain, model, (x, labels) = Net(), Net(), batch()
    model.load_state_dict(plain.state_dict())
    compiled = model
    if how == "wrapped":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "a part":
        compiled, plain = nn.Sequential(torch.compile(model, backend="eager")), nn.Sequential(plain)
    else:
        model.second = torch.compile(model.second, backend="eager")
    name = "0.second" if how == "a part" else "second"
    if called_before:
        compiled(x)
    ours, expected = (mk.ManifoldMixup(m, [name], mk.Mixup(generator=seeded())) for m in (compiled, plain))
    for _ in range(3):
        torch.testing.assert_close(ours(x, labels)[0], expected(x, labels)[0])
    torch.testing.assert_close(compiled(x), plain(x))
    if how == "wrapped":
        assert mk.ManifoldMixup(compiled, ["_orig_mod.second"], mk.Mixup()).layers == ("second",)


def test_mix_inside_a_forward_has_the_same_gradients(backend):
    """The other way to do it: ``mk.mix`` in the model's own forward."""
    model, (x, labels) = Net(), batch()
    draw = mk.Mixup(per_sample=True, generator=seeded()).draw(labels)
    hidden = mk.mix(model.first(x), draw.partner, draw.lam)
    ours = torch.autograd.grad(model.head(torch.tanh(hidden)).square().sum(), list(model.first.parameters()))
    logits = model.head(torch.tanh(mixed(draw, model.first(x))))
    for gradient, by_hand in zip(
        ours, torch.autograd.grad(logits.square().sum(), list(model.first.parameters())), strict=True
    ):
        torch.testing.assert_close(gradient, by_hand)
