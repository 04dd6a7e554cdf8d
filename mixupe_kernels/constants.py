"""Small constant tensors, made once for each device: making an ``arange`` anew costs as much as mixing a small batch."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

_LIMIT = 128  # entries: a few for each batch size in use
_tensors: dict[Hashable, Tensor] = {}


def constant(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """``make()``, or what it returned for ``key`` before. Callers must not write to it, nor hand it out."""
    # The compiler folds it, or keeps it in the graph; under a transform of torch.func it belongs to the transform.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return make()
    found = _tensors.get(key)
    if found is None:
        with torch.inference_mode(False):  # autograd refuses to save tensors made in inference mode
            found = make()
        if len(_tensors) >= _LIMIT:
            _tensors.clear()
        _tensors[key] = found
    return found


def sequence(size: int, device: torch.device) -> Tensor:
    """0, 1, ..., size - 1 as int64."""
    return constant(("sequence", size, device), lambda: torch.arange(size, device=device))
