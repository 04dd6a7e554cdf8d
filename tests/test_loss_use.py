"""The losses where users stand: what they do between calls, compiled and in other dtypes, and every shape of input."""

import pytest
import torch
import torch.nn.functional as F

import mixupe_kernels as mk

ROWS, CLASSES = 8, 5


@pytest.fixture
def target():
    labels = torch.randint(CLASSES, (ROWS,))
    return mk.MixedTarget(labels, labels.roll(1), torch.rand(ROWS), 5, 3, 0.3)


def soft(target):
    own, other = (F.one_hot(labels, CLASSES).float() for labels in (target.labels, target.partner_labels))
    return target._replace(labels=own, partner_labels=other)


# The forms that a loss takes: with the gradient made in the forward, in the backward, and composed.
FORMS = {
    "with gradient": {},
    "in the backward": {"dtype": torch.float16},
    "function": {"penalty": torch.square},
    "learned": {"learned": True},
}


def prepared(target, form, eta=0.4):
    """(criterion, logits, target) of a form of the loss."""
    options = dict(FORMS[form])
    dtype = options.pop("dtype", torch.float32)
    if options.pop("learned", False):
        target = soft(target)._replace(labels=soft(target).labels.requires_grad_())
    logits = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    return mk.MixupELoss(eta, **options), logits, target


@pytest.mark.parametrize("form", FORMS)
def test_a_criterion_first_called_in_inference_mode_trains_afterwards(backend, target, form):
    criterion, logits, target = prepared(target, form)
    with torch.inference_mode():
        criterion(torch.randn(ROWS, CLASSES, dtype=logits.dtype), target)
    criterion(logits, target).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_eta_may_be_set_between_a_loss_and_its_backward(backend, target, form, create_graph):
    criterion, logits, target = prepared(target, form)
    (expected,) = torch.autograd.grad(criterion(logits, target), logits, create_graph=create_graph)
    loss = criterion(logits, target)
    criterion.eta = 7.0
    (actual,) = torch.autograd.grad(loss, logits, create_graph=create_graph, retain_graph=True)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*torch.autograd.grad(loss, logits, retain_graph=True), expected)
    if create_graph:
        second = [torch.autograd.grad(gradient.square().sum(), logits)[0] for gradient in (actual, expected)]
        torch.testing.assert_close(*second)
    again = torch.autograd.grad(criterion(logits, target), logits)[0]
    assert (again - actual).abs().max() > 0.01


def test_a_tensor_of_eta_is_read_where_it_is_on_a_device(target):
    """A step captured in a CUDA graph reads the one tensor that setting eta rewrites."""
    criterion, logits, target = prepared(target, "with gradient")
    logits, target = logits.to("meta"), target.to("meta")
    criterion(logits, target)
    (before,) = criterion._eta.values()
    version = before._version
    criterion.eta = 7.0
    criterion(logits, target)
    (after,) = criterion._eta.values()
    assert after is before and after._version == version + 1


@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_handed_out_may_be_written_to(backend, target, form):
    criterion, logits, target = prepared(target, form)
    loss = criterion(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = gradient.clone()
    gradient.mul_(3)
    (again,) = torch.autograd.grad(loss, logits, retain_graph=True)
    torch.testing.assert_close(again, expected)
    (2 * loss).backward()
    torch.testing.assert_close(logits.grad, 2 * expected)


def test_a_compiled_loss_is_one_operator_with_its_gradient():
    labels, lam = torch.randint(CLASSES, (8,)), torch.rand(8)
    target, criterion = mk.MixedTarget(labels, labels.flip(0), lam, 4, 4, 0.3), mk.MixupELoss(0.4)
    logits = torch.randn(8, CLASSES, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: 3 * criterion(z, target), backend="aot_eager", fullgraph=True)
    compiled(logits).backward()  # compiles
    compiled_gradient, logits.grad = logits.grad, None
    with torch.profiler.profile() as profile:
        compiled(logits).backward()
    called = [event.name for event in profile.events() if event.name.startswith("mixupe::")]
    assert called == ["mixupe::mixupe_loss_with_gradient"]
    (expected,) = torch.autograd.grad(3 * criterion(logits, target), logits)
    torch.testing.assert_close(compiled_gradient, expected)


def test_a_compiled_loss_tells_its_parts():
    labels, logits = torch.randint(CLASSES, (8,)), torch.randn(8, CLASSES, requires_grad=True)
    target, criterion = mk.MixedTarget(labels, labels.flip(0), torch.rand(8), 4, 4, 0.3), mk.MixupELoss(0.4)
    criterion(logits, target)
    expected, criterion._last[0] = criterion.last, None
    torch._dynamo.reset()
    torch.compile(criterion, backend="aot_eager", fullgraph=True)(logits, target)
    torch.testing.assert_close(criterion.last, expected)


def test_a_loss_whose_graph_is_run_as_it_is_has_second_derivatives():
    """Compilers that differentiate ahead refuse them; Dynamo's own trace of a Function's backward loses them."""
    labels, lam = torch.randint(CLASSES, (8,)), torch.rand(8)
    target, criterion = mk.MixedTarget(labels, labels.flip(0), lam, 4, 4, 0.3), mk.MixupELoss(0.4)
    logits, found = torch.randn(8, CLASSES, requires_grad=True), []
    torch._dynamo.reset()
    for loss in (criterion, torch.compile(criterion, backend="eager", fullgraph=True)):
        (gradient,) = torch.autograd.grad(loss(logits, target), logits, create_graph=True)
        found.append(torch.autograd.grad(loss(logits, target) + gradient.square().sum(), logits)[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("form", ["with gradient", "function", "soft", "linear"])
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_loss_takes_another_batch_size(form, dynamic):
    criterion = mk.MixupELoss(0.4, **({"penalty": torch.square} if form == "function" else {}))
    weight = torch.randn(CLASSES, CLASSES)

    def loss(logits, labels, lam):
        half = logits.shape[0] // 2
        target = mk.MixedTarget(labels, labels.flip(0), lam, half, half, 0.3)
        if form == "linear":
            return mk.linear_mixupe_loss(logits, weight, target, eta=0.4, chunk_rows=4)
        return criterion(logits, target)

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", dynamic=dynamic, fullgraph=form != "linear")
    for rows in (8, 12) if dynamic else (8, 12, 6):  # with None the second size makes the graph that takes any
        logits = torch.randn(rows, CLASSES, requires_grad=True)
        labels = torch.rand(rows, CLASSES) if form == "soft" else torch.randint(CLASSES, (rows,))
        given = logits, labels, torch.rand(rows)
        values = [f(*given) for f in (compiled, loss)]
        torch.testing.assert_close(*values)
        torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in values))


@pytest.mark.filterwarnings("error:The tensor attribute")  # what export says of values kept on a module
def test_a_loss_is_exported(target):
    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.criterion = mk.MixupELoss(0.4)

        def forward(self, logits, labels, lam):
            return self.criterion(logits, mk.MixedTarget(labels, labels.flip(0), lam, 4, 2, 0.3))

    given = torch.randn(ROWS, CLASSES), target.labels, target.lam
    rows = torch.export.Dim("rows", min=6)
    exported = torch.export.export(Step(), given, dynamic_shapes=({0: rows},) * 3)
    for count in (ROWS, 6, 20):
        given = torch.randn(count, CLASSES), torch.randint(CLASSES, (count,)), torch.rand(count)
        torch.testing.assert_close(exported.module()(*given), Step()(*given))


@pytest.mark.parametrize("penalty", ["abs", torch.abs])
def test_scalars_are_exact_in_the_compute_dtype(backend, target, penalty):
    logits = torch.randn(ROWS, CLASSES, dtype=torch.float64)
    target = target._replace(lam=target.lam.double())
    ce, entropy, _ = mk.ce_entropy(logits, target)
    expected = ce[:5].mean() + 0.1 * 0.3 * (entropy - ce)[5:].abs().mean()
    for default in (torch.bfloat16, torch.float64, torch.float32):
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            criterion = mk.MixupELoss(0.1, rescale=False, penalty=penalty)
            values = [
                criterion(logits, target),
                mk.mixupe_loss(logits, target, eta=0.1, rescale=False, penalty=penalty),
                criterion(logits, target._replace(reg_weight=torch.tensor(0.3, dtype=torch.float64))),
            ]
            single = criterion(logits.float(), target._replace(lam=target.lam.float()))
        finally:
            torch.set_default_dtype(before)
        for value in values:
            torch.testing.assert_close(value, expected, rtol=1e-15, atol=0)
        assert single.dtype is torch.float32
    plain = mk.MixupELoss(0.1)(logits, (target.labels, target.partner_labels, 0.1))  # λ too
    expected = mk.ce_entropy(logits, target._replace(lam=torch.full((ROWS,), 0.1, dtype=torch.float64))).ce.mean()
    torch.testing.assert_close(plain, expected, rtol=1e-15, atol=0)


def every_loss(logits, target):
    """Each public function of logits and a target of class indices."""
    given = {"logits": logits, "target": target}
    eye = torch.eye(CLASSES, dtype=logits.dtype)
    return {
        "mixupe_loss": lambda: mk.mixupe_loss(**given, eta=0.4),
        "criterion": lambda: mk.MixupELoss(0.4)(logits, target),
        "function": lambda: mk.mixupe_loss(**given, eta=0.4, penalty=torch.square),
        "ce_entropy": lambda: mk.ce_entropy(**given),
        "q_hat": lambda: mk.q_hat(**given),
        "linear": lambda: mk.linear_mixupe_loss(logits, eye, target, eta=0.4),
        "soft": lambda: mk.mixupe_loss(logits, soft(target), eta=0.4),
        "sigmoid": lambda: mk.mixupe_loss(logits, soft(target), eta=0.4, activation="sigmoid"),
        "bce_entropy": lambda: mk.bce_entropy(logits, soft(target)),
    }


LOSSES = tuple(every_loss(torch.zeros(1, 1), None))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan"), float("inf")])
@pytest.mark.parametrize("wants_gradient", [False, True])
@pytest.mark.refuses
def test_lam_out_of_range_is_refused(backend, target, name, bad, wants_gradient):
    target.lam[2] = bad
    logits = torch.randn(ROWS, CLASSES, requires_grad=wants_gradient)
    with pytest.raises(ValueError, match=rf"^target.lam must be in \[0, 1\], got {bad}"):
        every_loss(logits, target)[name]()


@pytest.mark.parametrize("what", ["labels", "lam"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_the_linear_form_differentiates_a_learned_target(backend, target, what, activation):
    hidden, weight = torch.randn(ROWS, 3, requires_grad=True), torch.randn(CLASSES, 3, requires_grad=True)
    target = soft(target)
    learned = getattr(target, what).requires_grad_()
    options = {"eta": 0.4, "activation": activation}
    losses = (
        mk.linear_mixupe_loss(hidden, weight, target, **options),
        mk.mixupe_loss(hidden @ weight.t(), target, **options),
    )
    ours, theirs = (torch.autograd.grad(loss, (hidden, weight, learned)) for loss in losses)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("lam", [0.3, torch.tensor(0.3), torch.full((ROWS,), 0.3)], ids=["float", "0-d", "rows"])
def test_a_triple_is_cross_entropy_on_every_row(backend, target, lam):
    logits = torch.randn(ROWS, CLASSES)
    triple = target.labels, target.partner_labels, lam
    expected = 0.3 * F.cross_entropy(logits, triple[0]) + 0.7 * F.cross_entropy(logits, triple[1])
    torch.testing.assert_close(mk.mixupe_loss(logits, triple, eta=0.4), expected)
    torch.testing.assert_close(mk.MixupELoss()(logits, list(triple)), expected)
    torch.testing.assert_close(mk.ce_entropy(logits, triple).ce.mean(), expected)
    torch.testing.assert_close(mk.linear_mixupe_loss(logits, torch.eye(CLASSES), triple, eta=0.4), expected)


@pytest.mark.parametrize("name", ["mixupe_loss", "criterion", "function", "ce_entropy", "q_hat", "linear"])
@pytest.mark.parametrize(
    "bad, error, message",
    [
        (lambda t: (t.labels, t.partner_labels), TypeError, "target must be a MixedTarget, .* got tuple of 2"),
        (lambda t: tuple(t) + (1,), TypeError, "target must be a MixedTarget, .* got tuple of 7"),
        (lambda t: None, TypeError, "target must be a MixedTarget, .* got NoneType"),
        (lambda t: t.labels[:-1], ValueError, r"target must have shape \(8,\), got \(7,\)"),
        (lambda t: t.labels.int(), TypeError, "target must have dtype int64, got int32"),
        (lambda t: t._replace(labels=t.labels[:-1]), ValueError, r"target.labels must have shape \(8,\), got \(7,\)"),
        (lambda t: t._replace(lam=t.lam.to(torch.complex64)), TypeError, "target.lam must have dtype float32, .* got complex64"),
        (lambda t: (t.labels, t.partner_labels, 1.5), ValueError, "target.lam must be a number in .0, 1., got 1.5"),
        (lambda t: t.labels.to_sparse(), (TypeError, ValueError), "target must be a dense tensor"),
        (lambda t: t.labels.to("meta"), ValueError, "target must be on the device of logits, cpu, got meta"),
    ],
)  # fmt: skip
def test_bad_targets_are_named(backend, target, name, bad, error, message):
    with pytest.raises(error, match=f"^{message}"):
        every_loss(torch.randn(ROWS, CLASSES), bad(target))[name]()


def test_logits_of_three_dimensions_blame_the_labels(backend, target):
    logits = torch.randn(ROWS, 4, CLASSES)
    with pytest.raises(ValueError, match=r"^target.labels must have shape \(8, 4\), got \(8,\)"):
        mk.mixupe_loss(logits, target, eta=0.4)
    with pytest.raises(ValueError, match=r"^target must have shape \(8, 4\), got \(8,\)"):
        mk.mixupe_loss(logits, target.labels, eta=0.4)
    labels = torch.randint(CLASSES, (ROWS, 4))
    whole = target._replace(labels=labels, partner_labels=labels.flip(0))
    each = whole._replace(lam=target.lam.unsqueeze(1).expand(ROWS, 4))  # one λ a label
    assert torch.equal(mk.mixupe_loss(logits, whole, eta=0.4), mk.mixupe_loss(logits, each, eta=0.4))


@pytest.mark.parametrize("kind", ["labels", "soft", "mixed", "mixed soft", "pixels"])
def test_classes_in_the_second_dimension(backend, kind):
    logits = torch.randn(4, CLASSES, 3, 2, requires_grad=True)
    labels = torch.randint(CLASSES, (4, 3, 2))
    probabilities = torch.rand(4, CLASSES, 3, 2).softmax(1)
    lam = torch.rand(4, 3, 2) if kind == "pixels" else torch.rand(4)
    own, last = (probabilities, probabilities.movedim(1, -1)) if "soft" in kind else (labels, labels)
    images, rows = own, last
    if kind not in ("labels", "soft"):
        images, rows = (mk.MixedTarget(y, y.flip(0), lam, 2, 2, 0.3) for y in (own, last))
    loss = mk.mixupe_loss(logits, images, eta=0.4, class_dim=1)
    expected = mk.mixupe_loss(logits.movedim(1, -1), rows, eta=0.4)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(mk.MixupELoss(0.4, class_dim=1)(logits, images), expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))
    ce = mk.ce_entropy(logits, images, class_dim=1).ce
    assert ce.shape == (4, 3, 2)
    if kind in ("labels", "soft"):
        torch.testing.assert_close(ce, F.cross_entropy(logits, own, reduction="none"))
        torch.testing.assert_close(loss, F.cross_entropy(logits, own))
    with pytest.raises(ValueError, match="class_dim must be a dimension of the logits, .* got 4"):
        mk.mixupe_loss(logits, images, eta=0.4, class_dim=4)
    with pytest.raises(TypeError, match="class_dim must be an int, got float 1.0"):
        mk.MixupELoss(class_dim=1.0)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"eta": torch.tensor(1j)}, TypeError, "eta must have a real dtype"),
        ({"eta": torch.ones(2)}, ValueError, r"eta must be a number or a 0-d tensor, got shape \(2,\)"),
        ({"penalty": lambda q: 3.0}, TypeError, "penalty must return a tensor, got float"),
        ({"penalty": lambda q: q.sum()}, ValueError, "penalty must return one value for each"),
        ({"logits": torch.zeros(ROWS, CLASSES, dtype=torch.complex64)}, TypeError, "logits must have dtype float32"),
        ({"logits": torch.zeros(ROWS, CLASSES).to_sparse()}, (TypeError, ValueError), "logits must be a dense tensor"),
        ({"logits": [[0.0]]}, TypeError, "logits must be a torch.Tensor, got list"),
        ({"logits": torch.zeros(ROWS, 0)}, ValueError, r"logits must have shape \(N, C\) with C >= 1"),
        ({"logits": torch.zeros(())}, ValueError, r"logits must have shape \(..., C\) with C >= 1"),
    ],
)  # fmt: skip
def test_other_bad_arguments_are_named(backend, target, change, error, message):
    with pytest.raises(error, match=f"^{message}"):
        mk.mixupe_loss(**{"logits": torch.randn(ROWS, CLASSES), "target": target, "eta": 0.4, **change})


def test_a_class_weight_that_is_learned_is_refused(target):
    with pytest.raises(ValueError, match="class_weight must not require a gradient"):
        mk.ce_entropy(torch.randn(ROWS, CLASSES), target, class_weight=torch.ones(CLASSES, requires_grad=True))
