"""Blocks that fuse what stands between their matrix products.

A fused model has the modules, parameters and state_dict of the plain one; some modules have a
subclass of their class. Those compute with operators of this package (docs/math.md, "What a block
does to rows"). These take torch's own wherever a tensor is not plain numbers on the CPU:

- a projection: on AMD's processors with AVX-512, products in float32 by oneDNN instead of MKL;
- exact GELU, and the SiLU gate with its product: one pass each way;
- a residual connection, the norm behind it and the cast to autocast's dtype: one pass each way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gateloop_cpp import _library as _library  # loads the operators
from gateloop_cpp import _watchers
from gateloop_cpp._checks import expect
from gateloop_cpp.causal_full_attention import CausalFullAttention
from gateloop_cpp.gate_looped_attention import GateLoopedAttention
from gateloop_cpp.residual import PostNorm, PreNorm
from gateloop_cpp.rms_norm import RMSNorm
from gateloop_cpp.simple_gate_loop_layer import SimpleGateLoopLayer
from gateloop_cpp.transformer import Transformer

Module = TypeVar("Module", bound=nn.Module)


def fuse(model: Module) -> Module:
    """Fuse what stands between the matrix products of ``model``, in place.

    The numbers stay, to the rounding of their dtype, and so do parameters, state_dict, caches,
    ``generate`` and files. Layers and projections are still called as modules. Not called are the
    residual connections with their norms: PreNorm, PostNorm, the Identity of a layer without a
    mixer. Nor are the Sequential and the norm in front of the logits, and the SiLU of gates.

    Each of these parts is called as before where any module in it was changed, at any time. Such
    changes are hooks, a forward of its own, a compiled call or another class. All parts are called
    under hooks on all modules, modes that see torch's functions, ``torch.compile`` and the
    transforms of ``torch.func``. So they are where a class of modules has another forward or
    torch.nn.functional another function. With ``checkpoint_blocks`` residual connections are called
    too. Under autocast a norm passes its dtype on, and layers read that.

    So fuse first and wrap, shard, hook or quantise then. Tools that look for the class nn.Linear
    itself, not for its instances, miss a fused one: :func:`unfuse` before.

    Args:
        model: an untouched Transformer, GateLoopedAttention, CausalFullAttention or
            SimpleGateLoopLayer, on any device; fused already: nothing changes.

    Returns:
        ``model``.

    Raises:
        ValueError: naming the first module with something on it that fusing does not know: a
            class, hooks, a forward of an instance. Nothing is changed then.
    """
    known = tuple(kind.__name__ for kind in _WHOLE)
    expected = f"an untouched {', '.join(known[:-1])} or {known[-1]}"
    of_ours = plain_class(type(model)) in _WHOLE
    expect(of_ours, "fuse", "model", expected, f"the class {type(model).__qualname__}")
    for name, module in model.named_modules():
        found = _touch(module)
        expect(found is None, "fuse", "model", expected, f"{found} at {name or 'its top'}")
    for module in model.modules():
        module.__class__ = _FUSED.get(type(module), type(module))
    return model


def unfuse(model: Module) -> Module:
    """Undo :func:`fuse`, in place: every module has its own class again. Returns ``model``.

    Raises:
        ValueError: naming a module whose class was made from a fused one since, as FSDP and
            parametrizations do. Nothing is changed then.
    """
    fused = tuple(_FUSED.values())
    for name, module in model.named_modules():
        derived = isinstance(module, fused) and type(module) not in fused
        came = f"the class {type(module).__qualname__} at {name or 'its top'}"
        expect(not derived, "unfuse", "model", "fused and not wrapped since", came)
    for module in model.modules():
        module.__class__ = plain_class(type(module))
    return model


def plain_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a fused one stands for; of another class itself."""
    return _PLAIN.get(kind, kind)


# ---- Modules that are called as before -----------------------------------------------------------


def _is_seen(*tensors: Tensor | None) -> bool:
    """Whether torch's own function has to be called, for a compiler, a mode or a subclass."""
    return (
        torch.compiler.is_compiling()
        or _watchers.sees_functions()
        or torch.overrides.has_torch_function(tensors)
    )


class FusedLinear(nn.Linear):
    """torch.nn.Linear with the processor's fastest products."""

    def forward(self, input: Tensor) -> Tensor:
        if _watchers.is_replaced(nn.Linear, "forward") or _watchers.is_replaced(F, "linear"):
            return super().forward(input)
        weight, bias = self.weight, self.bias  # read once: a parametrization computes them
        if _is_seen(input, weight, bias):
            return F.linear(input, weight, bias)
        return cast(Tensor, torch.ops.gateloop.linear(input, weight, bias))


class FusedGELU(nn.GELU):
    """torch.nn.GELU, whose exact form is one pass each way."""

    def forward(self, input: Tensor) -> Tensor:
        replaced = _watchers.is_replaced(nn.GELU, "forward") or _watchers.is_replaced(F, "gelu")
        if replaced or _is_seen(input) or self.approximate != "none":
            return super().forward(input)
        return cast(Tensor, torch.ops.gateloop.gelu(input))


class FusedGateLoopedAttention(GateLoopedAttention):
    """GateLoopedAttention, which looks past the SiLU of its gates."""

    def _gated(self, x: Tensor, y: Tensor) -> Tensor:
        project = _projection_of_gates(self.to_gates)
        if project is None:
            return super()._gated(x, y)
        return cast(Tensor, torch.ops.gateloop.swish_gate(project(x), y))


class FusedCausalFullAttention(CausalFullAttention):
    """CausalFullAttention, which looks past the SiLU of its gates."""

    def _gated(self, x: Tensor, out: Tensor) -> Tensor:
        project = _projection_of_gates(self.to_gates)
        if project is None:
            return super()._gated(x, out)
        gated: Tensor = torch.ops.gateloop.swish_gate(project(x), out.flatten(2))
        return gated.view(out.shape)


def _projection_of_gates(gates: nn.Sequential | None) -> nn.Module | None:
    """The projection of a Linear with SiLU behind it, and perhaps an Unflatten, if untouched."""
    if gates is None or not _may_look_past(gates):
        return None
    kinds = [type(layer) for layer in gates]
    form = [FusedLinear, nn.SiLU, nn.Unflatten]
    return gates[0] if 2 <= len(kinds) <= 3 and kinds == form[: len(kinds)] else None


# ---- The residual stream -------------------------------------------------------------------------


@dataclass
class _Stream:
    """What flows from residual connection to residual connection."""

    x: Tensor  # (B, T, dim)
    added: Tensor | None = None  # what a layer has yet to add to x
    input: Tensor | None = None  # behind a post-norm: x as the next layer reads it

    def settled(self) -> Tensor:
        """x, after what was to be added."""
        if self.added is not None:
            self.x, self.added = self.x + self.added, None
        return self.x

    def normalised(self, norm: RMSNorm) -> Tensor:
        """The norm of the stream, to which nothing is then left to add."""
        if self.added is None:
            return _narrowed(norm(self.x))
        self.x, y = torch.ops.gateloop.add_then_rms_norm(self.x, self.added, norm.gamma)
        self.added = None
        return y


class FusedTransformer(Transformer):
    """Transformer, which adds what a layer returns where the next norm reads it."""

    def _run(self, block: nn.Module, x: Any, **options: Any) -> Any:
        around = self._around(block)
        if around is None:
            return super()._run(block, _settled(x), **options)
        return around(block, x if isinstance(x, _Stream) else _Stream(x), options)

    def _add(self, x: Any, y: Tensor) -> Any:
        if _watchers.of_all_modules() is not None:
            return super()._add(_settled(x), y)
        return _Stream(_settled(x), y)

    def _logits(self, x: Any) -> Tensor:
        last = self.to_logits
        if not isinstance(x, _Stream) or not _may_look_past(last):
            return super()._logits(_settled(x))
        if isinstance(last, nn.Sequential):
            if len(last) != 2 or not isinstance(last[0], RMSNorm):
                return super()._logits(_settled(x))
            return cast(Tensor, last[1](x.normalised(last[0])))
        return cast(Tensor, last(_settled(x) if x.input is None else x.input))

    def _around(self, block: nn.Module) -> Callable[..., Any] | None:
        """How to run a part on the stream, or None: it has to be called."""
        if self.checkpoint_blocks and torch.is_grad_enabled():
            return None
        if not _may_look_past(block):
            return None
        norm = block._modules.get("norm")
        if isinstance(block, PreNorm) and isinstance(norm, RMSNorm):
            return _pre_norm
        if isinstance(block, PostNorm) and _is_torchs_layer_norm(norm):
            return _post_norm
        return _nothing if isinstance(block, nn.Identity) else None


def _is_torchs_layer_norm(norm: nn.Module | None) -> bool:
    """With what the operator takes: weight, bias and the default ε."""
    if not isinstance(norm, nn.LayerNorm) or norm.weight is None or norm.bias is None:
        return False
    return norm.eps == 1e-5


def _nothing(block: nn.Module, stream: _Stream, options: dict[str, Any]) -> _Stream:
    return stream


def _pre_norm(block: PreNorm, stream: _Stream, options: dict[str, Any]) -> Any:
    y = block.fn(stream.normalised(block.norm), **options)
    if isinstance(y, tuple):
        return (_Stream(stream.x, y[0]), *y[1:])
    return _Stream(stream.x, y)


def _post_norm(block: PostNorm, stream: _Stream, options: dict[str, Any]) -> Any:
    x, norm = stream.settled(), block.norm
    y = block.fn(_narrowed(x) if stream.input is None else stream.input, **options)
    added, *others = y if isinstance(y, tuple) else (y,)
    normalised = torch.ops.gateloop.add_then_layer_norm(x, added, norm.weight, norm.bias)
    after = _Stream(normalised[0], input=normalised[-1])
    return (after, *others) if isinstance(y, tuple) else after


def _settled(x: Any) -> Tensor:
    return x.settled() if isinstance(x, _Stream) else x


def _narrowed(x: Tensor) -> Tensor:
    """x as several projections read it: cast once instead of by each of them."""
    device = x.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.to(torch.get_autocast_dtype(device)) if casts and x.dtype != torch.float64 else x


# ---- What may be looked past ---------------------------------------------------------------------

_FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: FusedLinear,
    nn.GELU: FusedGELU,
    GateLoopedAttention: FusedGateLoopedAttention,
    CausalFullAttention: FusedCausalFullAttention,
    Transformer: FusedTransformer,
}
_PLAIN = {fused: plain for plain, fused in _FUSED.items()}
_WHOLE = (Transformer, GateLoopedAttention, CausalFullAttention, SimpleGateLoopLayer)
_KNOWN = frozenset((*_watchers.CLASSES, *_PLAIN))


def _touch(module: nn.Module) -> str | None:
    """What makes a module more than its class and its weights; None: nothing."""
    if type(module) not in _KNOWN:
        return f"the class {type(module).__qualname__}"
    return _watchers.of_module(module)


def _is_untouched(module: nn.Module) -> bool:
    """Of all modules in it."""
    if _touch(module) is not None:
        return False
    return all(_is_untouched(child) for child in module._modules.values() if child is not None)


def _may_look_past(module: nn.Module) -> bool:
    return _watchers.of_all_modules() is None and _is_untouched(module)
