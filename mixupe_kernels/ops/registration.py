"""How an operator is declared: its schema from its reference's signature, the reference for every device, its autograd.

The reference is registered for every device, so that each operator exists with nothing compiled; ``backends`` adds faster
kernels under the same names and the dispatcher picks one.

An operator is differentiable by one ``torch.autograd.Function``, in calls of the public functions and of ``torch.ops``.
``torch.library.register_autograd`` does that at twice the cost a call (66 against 32 µs for a forward and backward of three
small outputs, torch 2.13), drops tangents of forward mode without a word, and is refused by torch.func.

This is the one file of the package that uses private names of torch, each with its reason.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import checks
from ..conventions import OLD_COMPILER
from .arguments import Signature

library = torch.library.Library("mixupe", "DEF")


class Operator(Protocol):
    """An overload of ``torch.ops``, whose class has no public name."""

    def __call__(self, *args: Any, **written: Any) -> Any: ...
    def name(self) -> str: ...


_signatures: dict[str, Signature] = {}
_references: dict[str, Callable] = {}
_functions: dict[Operator, "_Differentiable"] = {}


def define(function: Callable, fake: Callable) -> Operator:
    """Declare the operator that ``function`` defines, under its name; return its overload."""
    signature = Signature(function)
    library.define(signature.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _references[signature.name] = signature.taking_flat(function)
    library.impl(signature.name, _references[signature.name], "CompositeExplicitAutograd")
    torch.library.register_fake(f"mixupe::{signature.name}", fake, lib=library)
    _signatures[signature.name] = signature
    return getattr(torch.ops.mixupe, signature.name).default


def composite(function: Callable) -> Operator:
    """Declare ``function``, made of operators and Functions, under its name: Dynamo puts the call into its graph unopened.

    A backend of the compiler that differentiates ahead traces through it; one that runs the graph as it is calls it.
    ``torch.compiler.allow_in_graph`` does the same, and imports the compiler with the package.
    """
    signature = Signature(function)
    library.define(signature.schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(signature.name, signature.taking_flat(function), "CompositeImplicitAutograd")
    return getattr(torch.ops.mixupe, signature.name).default


def is_exporting() -> bool:
    """Whether torch.export is at work. Where Dynamo cannot tell it from torch.compile, what it traces is compiled."""
    return torch.compiler.is_exporting() and not (OLD_COMPILER and torch.compiler.is_dynamo_compiling())


def signature_of(operator: Operator) -> Signature:
    return _signatures[operator.name().split("::")[1]]


def operators() -> list[str]:
    """The name of each operator: what a backend has to provide."""
    return list(_signatures)


def references() -> dict[str, Callable]:
    """The functions that define the operators, as the dispatcher calls them: with flat arguments."""
    return dict(_references)


# What a Function keeps -------------------------------------------------------------------------------------------------


def keep(ctx: Any, values: Any) -> None:
    """Save a namedtuple for the backward and for forward mode: its tensors as autograd saves them, the rest as they are."""
    tensors = [value if isinstance(value, Tensor) else None for value in values]
    ctx.save_for_backward(*tensors)
    if forward_ad._current_level >= 0:
        ctx.save_for_forward(*tensors)
    ctx.others = values._make(None if isinstance(value, Tensor) else value for value in values)


def kept(ctx: Any) -> Any:
    """The namedtuple that ``keep`` saved."""
    saved = zip(ctx.saved_tensors, ctx.others, strict=True)
    return ctx.others._make(other if tensor is None else tensor for tensor, other in saved)


def _primals(values: Any) -> Any:
    """The namedtuple without the tangents that forward mode gave its tensors."""
    return values._make(forward_ad.unpack_dual(v).primal if isinstance(v, Tensor) else v for v in values)


# Functions -------------------------------------------------------------------------------------------------------------


class _Differentiable(NamedTuple):
    """The Functions of an operator, which differ in how ``apply`` looks for transforms of torch.func."""

    function: type[torch.autograd.Function]  # the operator's Function
    eager: type[torch.autograd.Function]  # knows of none
    single_level: type  # for one, within the dispatcher


def differentiable(operator: Operator, *inputs: str) -> Callable[[type], type]:
    """Make a class of setup_context and backward the ``operator``'s Function, which has forward mode if it has a jvp.

    ``inputs`` are the arguments it is differentiable in: a gradient of others is refused. ``jvp`` takes what ``keep`` kept
    and the tangents. A ``vmap`` of its own does better than a loop.
    """

    def register(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
        methods: dict[str, Callable] = {"backward": function.backward}
        if function.jvp is not torch.autograd.Function.jvp:
            methods["jvp"] = _in_forward_mode(function.jvp)
        own = {**methods, "forward": lambda *args: below_autograd(operator, *args)}
        if function.vmap is torch.autograd.Function.vmap:
            own["vmap"] = functools.partial(each_member, function)

        flat = signature_of(operator).Flat  # with the defaults that the dispatcher drops
        others = [index for index, name in enumerate(flat._fields) if name not in inputs]
        given_setup = function.setup_context

        def setup_context(ctx, inputs_given, output):
            needed = ctx.needs_input_grad
            for index in others:
                if index < len(needed) and needed[index]:
                    name = flat._fields[index]
                    raise RuntimeError(f"{operator} is differentiable in {', '.join(inputs)} only, not in {name}")
            given_setup(ctx, inputs_given, output)

        def forward(ctx, *args):
            output = below_autograd(operator, *args)
            setup_context(ctx, args, output)
            return output

        own["setup_context"] = setup_context
        for name, method in own.items():
            setattr(function, name, staticmethod(method))
        # Function.apply binds the arguments of a forward apart from its setup_context to the inspected signature: 29 of
        # 38 µs, which only torch.func needs.
        eager = _subclass(function, torch.autograd.Function, forward=forward, **methods)
        single_level = _single_level(operator, function, methods)
        functions = _functions[operator] = _Differentiable(function, eager, single_level)

        def kernel(*args):
            if transforms_active():
                return apply_single_level(single_level, flat(*args))
            return untransformed(functions.eager, operator, flat(*args))

        library.impl(signature_of(operator).name, kernel, "Autograd")
        return function

    return register


def _subclass(function: type, base: type, **methods: Callable) -> type:
    return type(function.__name__, (base,), {name: staticmethod(method) for name, method in methods.items()})


def each_member(function: type[torch.autograd.Function], info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """A vmap rule for any operator: one call for each member of the mapped dimension."""
    members = [
        function.apply(*(v if d is None else v.select(d, i) for v, d in zip(args, in_dims, strict=True)))
        for i in range(info.batch_size)
    ]
    if isinstance(members[0], Tensor):
        return torch.stack(members), 0
    return tuple(map(torch.stack, zip(*members, strict=True))), (0,) * len(members[0])


def apply_untransformed(function: type[torch.autograd.Function]) -> Callable:
    """``function.apply`` without its look for transforms of torch.func, 2 of 60 µs: for callers that have looked."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]  # torch's stubs leave it out


def without_gradient(operator: Operator) -> Operator:
    """Let autograd pass ``operator`` by: its kernels give results without a gradient, whatever its arguments."""
    library.impl(signature_of(operator).name, torch.library.fallthrough_kernel, "Autograd")
    return operator


def call(operator: Operator, *args, **written) -> Any:
    """``operator(*args)`` by its Function, with its complaints about arguments as the errors they stand for."""
    try:
        functions = _functions.get(operator)
        if functions is None or torch.compiler.is_compiling():
            return operator(*args, **written)
        if transforms_active():
            return functions.function.apply(*args)
        return untransformed(functions.eager, operator, args)
    except (RuntimeError, TypeError, ValueError) as error:
        raise checks.translate(error) from None


# Private names of torch --------------------------------------------------------------------------------------------------


def below_autograd(operator: Operator, *args) -> Any:
    """The operator's kernel itself, for use inside its Function or where nothing is differentiated.

    Nothing public skips the Autograd key.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def untransformed(function: type[torch.autograd.Function], operator: Operator, args: tuple) -> Any:
    """``operator(*args)`` where no transform is active: by its ``function``, or its kernel if nothing is differentiated."""
    # Nothing public asks all arguments at once: a loop takes 1.2 µs for the nine of mix.
    if (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)) or forward_ad._current_level >= 0:
        return function.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


# Whether a transform of torch.func is active: an ``autograd.Function`` then has to be written for it. Nothing public tells.
transforms_active = torch._C._are_functorch_transforms_active
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def in_backward() -> bool:
    """Whether this thread is running a backward pass. Nothing public tells it; torch.utils.checkpoint asks the same way."""
    return torch._C._current_graph_task_id() != -1


def differentiates_otherwise() -> bool:
    """Whether torch.func or forward mode is at work. Public functions tell of one tensor's tangent only."""
    return transforms_active() or forward_ad._current_level >= 0


def is_transformed(value: Tensor) -> bool:
    """Whether torch.func or forward mode is at work, or was on ``value``: more may be differentiated than meets the eye.

    Of nested transforms, an outer one may differentiate in what the inner one takes for a constant. Nothing public tells
    of a tensor that outlived its transform.
    """
    if (
        transforms_active() or forward_ad._current_level >= 0
    ):  # differentiates_otherwise(), without a call in every step
        return True
    if torch.compiler.is_dynamo_compiling():  # no such tensor gets into a graph
        return False
    return _is_wrapped(value)


def _in_forward_mode(jvp: Callable) -> Callable:
    """``jvp(kept, *tangents)`` as a Function's, whose result may itself be differentiated in forward mode.

    Autograd disables forward mode while it runs a jvp, and so for outer levels of torch.func, too: jacfwd of jacfwd would
    come out wrong. Nothing public enables it.
    """

    def enabled(ctx, *tangents):
        with forward_ad._set_fwd_grad_enabled(True):
            return jvp(_primals(kept(ctx)), *tangents)

    return enabled


# Under torch.func the dispatcher calls a kernel of the Autograd key once for each transform, to differentiate for that one
# alone. Function.apply would begin with the outermost again, and the kernel of torch.library.register_autograd, which has
# no setup_context, is refused; torch's own Functions of one level are private. The compiler, which traces operators, needs
# them: torch.compile(torch.func.grad(loss)).


def _single_level(operator: Operator, function: type[torch.autograd.Function], methods: dict[str, Callable]) -> type:
    def forward(*args):
        # Both modes are for the next outer transform, and disabled while a forward runs.
        with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
            return below_autograd(operator, *args)

    base = torch.autograd.function._SingleLevelFunction
    return _subclass(function, base, forward=forward, setup_context=function.setup_context, **methods)


def apply_single_level(function: Any, args: tuple) -> Any:
    with torch._functorch.utils.enable_single_level_autograd_function():
        return function.apply(*args)
