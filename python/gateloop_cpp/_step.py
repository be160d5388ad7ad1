"""One token of one sequence through a whole Transformer: decoding as one operator."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gateloop_cpp import _library as _library  # loads the operators
from gateloop_cpp._autocast import autocasts
from gateloop_cpp._projection import has_hooks
from gateloop_cpp.gate_looped_attention import GateLoopedAttention

if TYPE_CHECKING:
    from gateloop_cpp.transformer import Cache, Transformer

Step = Callable[[Tensor, "Cache"], tuple[Tensor, "Cache"]]

# Parameters of a layer in the order in which the operator takes them; {} is the norm's gain.
_LAYER = (
    "0.norm.{}",
    "0.norm.bias",
    "0.fn.to_qkv.weight",
    "0.fn.to_a.0.weight",
    "0.fn.to_a.0.bias",
    "0.fn.maybe_sub_ln.weight",
    "0.fn.maybe_sub_ln.bias",
    "0.fn.to_gates.0.weight",
    "0.fn.to_out.weight",
    "1.norm.{}",
    "1.norm.bias",
    "1.fn.0.weight",
    "1.fn.0.bias",
    "1.fn.2.weight",
    "1.fn.2.bias",
)


def decoding_step(model: "Transformer") -> Step | None:
    """(ids (1, 1), cache) to (logits, cache) as ``model`` would, without gradients and while its
    weights stay where they are; None where the operator does not know the model.
    """
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if traced or autocasts(torch.device("cpu")) or not _is_as_its_options_say(model):
        return None

    parameters = dict(model.named_parameters(remove_duplicate=False))
    post_norm = model.options["post_ln_norm"]
    names = ["token_emb.weight", "to_logits.0.gamma"]
    names.append("to_logits.weight" if post_norm else "to_logits.1.weight")
    for i in range(len(model.layers)):
        gain = "weight" if post_norm else "gamma"
        names += [f"layers.{i}.{name.format(gain)}" for name in _LAYER]
    weights = [parameters.get(name) for name in names]
    sigmoid, normalize = model.options["gate"] == "sigmoid", model.options["normalize_input"]

    def step(ids: Tensor, cache: "Cache") -> tuple[Tensor, "Cache"]:
        result: Any = torch.ops.gateloop._transformer_step(
            ids, weights, list(cache), post_norm, sigmoid, normalize
        )
        logits, states = result
        return cast(Tensor, logits), tuple(states)

    return step


def _is_as_its_options_say(model: "Transformer") -> bool:
    """Whether nobody has changed ``model``, and its heads are one channel wide."""
    o = model.options
    max_heads = o["gate_loop_heads"] in (None, o["dim_gate_looped_attn"] or o["dim"])
    ablated = model.ablate_complex or model.ablate_state_transition
    if ablated or not (o["use_gate_looped_attn"] and max_heads):
        return False
    with torch.device("meta"):
        twin = type(model)(**o)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    expected = {name: p.shape for name, p in twin.named_parameters()}
    dtype = model.token_emb.weight.dtype
    return (
        [_describe(m) for m in model.modules()] == [_describe(m) for m in twin.modules()]
        and not any(has_hooks(m) for m in model.modules())
        and {name: p.shape for name, p in parameters.items()} == expected
        and all(
            type(p) is nn.Parameter and p.is_cpu and p.is_contiguous() and p.dtype == dtype
            for p in parameters.values()
        )
    )


def _describe(module: nn.Module) -> tuple[Any, ...]:
    """What a module computes, but for its parameters and children."""
    if isinstance(module, GateLoopedAttention):
        return type(module), module.heads, module.gate, module.normalize_input
    return type(module), module.extra_repr()
