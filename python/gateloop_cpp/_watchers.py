"""Whether hooks, modes or replaced functions rule out code that does not call the modules."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext

from gateloop_cpp.residual import PostNorm, PreNorm
from gateloop_cpp.rms_norm import RMSNorm

# What a library may replace for all modules, as it was when this package was imported.
_CLASSES = (
    nn.Embedding,
    nn.LayerNorm,
    nn.Linear,
    nn.GELU,
    nn.SiLU,
    nn.Sequential,
    RMSNorm,
    PreNorm,
    PostNorm,
)
_PLACES: list[tuple[Any, str]] = [
    *((cls, "forward") for cls in _CLASSES),
    (nn.Module, "__call__"),
    *((F, name) for name in ("linear", "gelu", "silu", "layer_norm")),
]
_FUNCTIONS = {(place, name): getattr(place, name) for place, name in _PLACES}


def is_replaced(place: Any, name: str) -> bool:
    """Whether a function of ``_PLACES`` is another than when this package was imported."""
    return getattr(place, name) is not _FUNCTIONS[place, name]


def of_all_modules() -> str | None:
    """What now intercepts or changes every module, or torch's functions; None: nothing."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return "a transform of torch"
    if torch._C._get_tracing_state() is not None:
        return "a trace"
    if nn_module._has_any_global_hook():
        return "hooks on all modules"
    for place, name in _PLACES:
        if is_replaced(place, name):
            return f"another {place.__name__}.{name}"
    return "a mode that sees torch's functions" if sees_functions() else None


def sees_functions() -> bool:
    """Whether a mode other than that of a default device intercepts torch's functions."""
    if not torch._C._len_torch_function_stack():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return not all(isinstance(mode, DeviceContext) for mode in modes)


def of_module(module: nn.Module) -> str | None:
    """What intercepts or changes the calls of this module alone; None: nothing."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    ):
        return "a hook"
    if "forward" in module.__dict__:
        return "a forward of its own"
    return None if module._compiled_call_impl is None else "a compiled call"
