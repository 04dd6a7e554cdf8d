"""How an operator is declared: its schema once, the reference for every device, its fake, its autograd.

The reference is registered for every device, so that each operator exists with nothing compiled; ``backends`` adds faster
kernels under the same names and the dispatcher picks one.

Autograd is registered as an ``autograd.Function`` on the Autograd key: ``torch.library.register_autograd``
does the same at twice the cost a call (66 against 32 µs for a forward and backward of three small outputs, torch 2.13).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .. import checks
from . import reference

library = torch.library.Library("mixupe", "DEF")


def define(schema: str, fake: Callable | None = None) -> Callable:
    """Declare an operator whose reference is the function of the same name; return its overload."""
    name = schema.split("(")[0]
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
    if fake is not None:
        torch.library.register_fake(f"mixupe::{name}", fake, lib=library)
    return getattr(torch.ops.mixupe, name).default


# Operator → its kernel for the Autograd key.
_kernels: dict[Callable, Callable] = {}


class Function(torch.autograd.Function):
    """One whose ``apply`` leaves out what functions with a ``setup_context`` need: 3 of 36 µs, 8 of 55 with cold caches.

    Under nested transforms of torch.func the dispatcher calls a kernel of the Autograd key once for each of them, and each
    time it differentiates for that one alone. ``apply_here`` is for callers that know of no transform, active or past, and
    takes as much less again.
    """

    def __init_subclass__(cls):
        super().__init_subclass__()
        cls.apply_here = super(torch.autograd.Function, cls).apply

    @classmethod
    def apply(cls, *args):
        apply = super(torch.autograd.Function, cls).apply
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return apply(*args)
        unwrap = torch._C._functorch.unwrap_if_dead  # what torch's own apply does next
        return apply(*[unwrap(value) if isinstance(value, torch.Tensor) else value for value in args])


def differentiable(function: type[Function]) -> type[Function]:
    """Register ``function`` on the Autograd key of its ``operator``, which has reverse mode only.

    A function that names its differentiable ``inputs`` takes them and then one tuple of the other arguments, each of
    which ``apply`` would otherwise look at (13 of them: 3 of 41 µs).
    """
    operator = function.operator
    name = operator._schema.name.split("::")[1]
    inputs = getattr(function, "inputs", ())
    arguments = operator._schema.arguments
    # The dispatcher drops trailing arguments that equal their defaults; backward counts on all of them.
    defaults = [argument.default_value for argument in arguments]
    tensors = [index for index, argument in enumerate(arguments) if "Tensor" in str(argument.type)]

    def kernel(*args):
        if checks.has_tangent(*args):
            raise NotImplementedError(
                f"mixupe::{name} has no derivative in forward mode (torch.func.jvp, jacfwd, hessian): use reverse mode "
                "(torch.func.grad, jacrev, jacrev of jacrev)"
            )
        if torch.is_grad_enabled():
            args = (*args, *defaults[len(args) :])
            wanting = [index for index in tensors if args[index] is not None and args[index].requires_grad]
            if wanting and not inputs:
                return function.apply(*args)
            if wanting:
                if wanting[-1] >= len(inputs):
                    raise RuntimeError(f"mixupe::{name} is differentiable in {', '.join(inputs)} only")
                return function.apply(*args[: len(inputs)], args[len(inputs) :])
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    library.impl(name, kernel, "Autograd")
    _kernels[operator] = kernel
    return function


def detached(operator: Callable) -> Callable:
    """Let autograd pass ``operator`` by: its kernels give results without a gradient, whatever its arguments."""
    library.impl(operator._schema.name.split("::")[1], torch.library.fallthrough_kernel, "Autograd")
    return operator


def below_autograd(operator: Callable, args: tuple) -> Any:
    """The operator's kernel itself, for use inside its ``Function``.

    Under a transform of torch.func that is the kernel of the next outer transform, which may differentiate too, in either
    mode: both are enabled where a ``Function`` is applied, and disabled while it runs its forward.
    """
    if not torch._C._are_functorch_transforms_active():
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def call(operator: Callable, *args, **kwargs) -> Any:
    """``operator(*args)``, with a compiled backend's complaint about a tensor's values as the ValueError it stands for.

    In eager mode the Autograd kernel is called as the Python function it is: the dispatcher would pass every argument
    to C++ and back to get there (a forward and backward of mixupe_loss on 256 rows: 200 µs so, 140 µs directly).
    """
    kernel = _kernels.get(operator)
    if kernel is None or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        kernel = operator
    try:
        return kernel(*args, **kwargs)
    except RuntimeError as error:
        raise checks.translate(error) from None


def operators() -> list[str]:
    """The name of each operator: what a backend has to provide."""
    return [name for name in vars(torch.ops.mixupe) if callable(getattr(reference, name, None))]


def transforms_active() -> bool:
    """Whether a transform of torch.func is active: an ``autograd.Function`` then has to be written for it."""
    return torch._C._are_functorch_transforms_active()


def in_backward() -> bool:
    """Whether this thread is running a backward pass. Nothing public tells it; torch.utils.checkpoint asks the same way."""
    return torch._C._current_graph_task_id() != -1
