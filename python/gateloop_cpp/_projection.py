"""Linear layers, and what a projection of ours does beside calling one."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gateloop_cpp import _library as _library  # loads the operators
from gateloop_cpp._autocast import autocasts

# Below this, an activation that is computed again saves little memory, and to note how takes some
# 100 µs.
LEAST_BYTES = 4 << 20
# From here on memory begins to matter more than time (8192 steps of the train.py model), and what
# costs a product or a recurrence is computed again too.
LARGE_BYTES = 16 << 20

_packed: ContextVar[Mapping[nn.Module, Tensor]] = ContextVar(
    "_packed", default=MappingProxyType({})
)


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Within, project() multiplies by copies of the matrices of ``model`` in the layout of oneDNN's
    products: for many passes without gradients, while the weights stay as they are.
    """
    own = autocasts(torch.device("cpu")) or torch._C._are_functorch_transforms_active()
    layers = [] if own else filter(is_plain, model.modules())
    token = _packed.set({m: torch.ops.gateloop._packed(m.weight) for m in layers})
    try:
        yield
    finally:
        _packed.reset(token)


def move_to_large_pages(model: nn.Module) -> None:
    """Moves the matrices of ``model`` to large pages where the system can (Linux): for many
    products with one row, bound by reading them. Addresses and contents stay."""
    for layer in filter(is_plain, model.modules()):
        torch.ops.gateloop._move_to_large_pages(layer.weight)


def project(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x), by a kernel of our own where one row meets the whole matrix, decoding, or with the
    copy of :func:`packed_weights`."""
    inference = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    if inference and is_plain(layer):
        one_row = x.numel() == layer.in_features
        weight = layer.weight if one_row else _packed.get().get(layer)
        if weight is not None:
            return cast(Tensor, torch.ops.gateloop._linear(x, weight, layer.bias))
    return cast(Tensor, layer(x))


def project_activated(layer: nn.Module, activation: Callable[..., Tensor], *x: Tensor) -> Tensor:
    """layer(activation(*x)), keeping ``x`` for the backward pass instead of the layer's input.

    The activation, cheap beside the product, is computed again; the product is not. A compiler
    decides by itself what to keep. ``activation`` reads no module, for in the backward pass that
    may hold other parameters (``torch.func.functional_call``).
    """
    large = sum(t.numel() * t.element_size() for t in x) >= LEAST_BYTES
    if not (large and _records() and is_plain(layer)):
        return project(layer, activation(*x))
    weight, bias = layer.weight, layer.bias
    y: Tensor = checkpoint(
        lambda *x: F.linear(activation(*x), weight, bias),
        *x,
        use_reentrant=False,
        preserve_rng_state=False,
    )
    return y


def is_large(x: Tensor) -> bool:
    """Whether a block that reads x (B, T, dim) shall keep little for the backward pass."""
    return _records() and x.numel() * x.element_size() >= LARGE_BYTES


def _records() -> bool:
    """Whether a graph is recorded here, whose size is ours to choose and not a compiler's."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether nobody would notice that the layer itself is not called."""
    return type(layer) is nn.Linear and not has_hooks(layer)


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
