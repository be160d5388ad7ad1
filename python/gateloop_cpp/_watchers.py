"""Whether hooks, modes or replaced functions rule out code that does not call the modules."""

from inspect import isroutine
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules import module as nn_module
from torch.utils._device import DeviceContext

from gateloop_cpp.causal_full_attention import CausalFullAttention
from gateloop_cpp.feed_forward import FeedForward
from gateloop_cpp.gate_looped_attention import GateLoopedAttention
from gateloop_cpp.residual import PostNorm, PreNorm
from gateloop_cpp.rms_norm import RMSNorm
from gateloop_cpp.rotary_embedding import RotaryEmbedding
from gateloop_cpp.simple_gate_loop_layer import SimpleGateLoopLayer
from gateloop_cpp.transformer import Transformer

#: Every class of the modules in a model of this package; fuse() and Decoder refuse another.
CLASSES: tuple[type[nn.Module], ...] = (
    CausalFullAttention,
    FeedForward,
    GateLoopedAttention,
    PostNorm,
    PreNorm,
    RMSNorm,
    RotaryEmbedding,
    SimpleGateLoopLayer,
    Transformer,
    nn.Embedding,
    nn.Flatten,
    nn.GELU,
    nn.Identity,
    nn.LayerNorm,
    nn.Linear,
    nn.ModuleList,
    nn.Sequential,
    nn.SiLU,
    nn.Unflatten,
)

# What a library may replace for all modules: how they are called, and torch's functions.
_FUNCTIONAL = [name for name, value in vars(F).items() if isroutine(value) and name[0] != "_"]
_PLACES: list[tuple[Any, str]] = [
    (nn.Module, "_call_impl"),
    *((cls, "__call__") for cls in CLASSES),
    *((cls, "forward") for cls in CLASSES),
    *((F, name) for name in _FUNCTIONAL),
]
_of_functional = itemgetter(*_FUNCTIONAL)


def _functions() -> list[Any]:
    """Those in ``_PLACES``, in 3 microseconds: a fused part reads them before each call."""
    calls, forwards = [cls.__call__ for cls in CLASSES], [cls.forward for cls in CLASSES]
    return [nn.Module._call_impl, *calls, *forwards, *_of_functional(vars(F))]


_IMPORTED = _functions()  # when this package was imported
_FUNCTIONS = dict(zip(_PLACES, _IMPORTED, strict=True))


def is_replaced(place: Any, name: str) -> bool:
    """Whether a function in ``_PLACES`` is another than when this package was imported."""
    return getattr(place, name) is not _FUNCTIONS[place, name]


def of_all_modules() -> str | None:
    """What now intercepts or changes every module, or torch's functions; None: nothing."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return "a transform of torch"
    if torch._C._get_tracing_state() is not None:
        return "a trace"
    if nn_module._has_any_global_hook():
        return "hooks on all modules"
    if _functions() != _IMPORTED:
        place, name = next(found for found in _PLACES if is_replaced(*found))
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
