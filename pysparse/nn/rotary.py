"""The rotary embedding of a model's attention in one call: the function that its modelling code calls is stood in for.

Attention modules of transformers call ``apply_rotary_pos_emb`` of the file that defines them; there is no place in a
model to put another one. So the name in that file is bound to a function that asks the kernels first.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from pysparse import backend, ops
from pysparse.nn.mixin import check_module

NAME = "apply_rotary_pos_emb"
_ORIGINAL = "__pysparse_original__"

Function = Callable[..., Any]


def fuse_rotary_(model: nn.Module) -> tuple[str, ...]:
    """Let queries and keys of ``model`` be rotated in one call of the core; return the names of the modelling files.

    That concerns calls without gradients on the CPU in float32 or bfloat16; the results have the same bits, and
    any other call goes to the function that was there. Files whose function computes something else, judged by
    its values, are left alone. It holds for every model of these files in this process, until
    :func:`unfuse_rotary_`. Without the compiled core nothing is done. TypeError for what is no module.
    """
    check_module(model)
    done = []
    for file in _files(model) if backend.available() else ():
        function = getattr(file, NAME)
        if not hasattr(function, _ORIGINAL):
            if not _is_rotary(function):
                continue
            setattr(file, NAME, _standing_in_for(function))
        done.append(file.__name__)
    return tuple(done)


def unfuse_rotary_(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse_rotary_` in the files of ``model``, and return it."""
    for file in _files(model):
        setattr(file, NAME, getattr(getattr(file, NAME), _ORIGINAL, getattr(file, NAME)))
    return model


def _files(model: nn.Module) -> Iterator[ModuleType]:
    """Yield the modules of Python that define modules of ``model`` and have a function of that name, each once."""
    for name in sorted({kind.__module__ for module in model.modules() for kind in type(module).__mro__}):
        file = sys.modules.get(name)
        if file is not None and callable(getattr(file, NAME, None)):
            yield file


def _standing_in_for(function: Function) -> Function:
    @functools.wraps(function)
    def rotate(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 4 and not kwargs and ops.can_rotate(*args):
            return ops.call_rotary(*args)
        return function(*args, **kwargs)

    setattr(rotate, _ORIGINAL, function)
    return rotate


@torch.no_grad()
def _is_rotary(function: Function) -> bool:
    """Tell whether ``function`` has the kernels' bits in both dtypes, with angles that are no angles' cosines."""
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 3, 16), (2, 2, 3, 16), (2, 3, 16), (2, 3, 16)
    for dtype in ops.KERNEL_DTYPES:
        parts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
        try:
            found = function(*(part.clone() for part in parts))
        except Exception:  # whatever a function of that name does to arguments that are not its own
            return False
        if not (
            isinstance(found, tuple) and len(found) == 2 and all(map(_is_same, found, ops.rotary(*parts)))
        ):
            return False
    return True


def _is_same(value: Any, expected: Tensor) -> bool:
    return isinstance(value, Tensor) and value.dtype is expected.dtype and torch.equal(value, expected)
