"""One token of one sequence through a whole Transformer: decoding as one operator."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from gateloop_cpp import _library as _library  # loads the operators
from gateloop_cpp._autocast import autocasts
from gateloop_cpp._projection import has_hooks
from gateloop_cpp.feed_forward import FeedForward
from gateloop_cpp.gate_looped_attention import GateLoopedAttention
from gateloop_cpp.residual import PostNorm, PreNorm
from gateloop_cpp.rms_norm import RMSNorm

if TYPE_CHECKING:
    from gateloop_cpp.transformer import Cache, Transformer

Step = Callable[[Tensor, "Cache"], tuple[Tensor, "Cache"]]

# Modules that compute what the operator takes them to compute.
_KNOWN = {GateLoopedAttention, FeedForward, PreNorm, PostNorm, RMSNorm} | {
    nn.Embedding,
    nn.GELU,
    nn.Identity,
    nn.LayerNorm,
    nn.Linear,
    nn.ModuleList,
    nn.Sequential,
    nn.SiLU,
}
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

    The matrices move to large pages where the system can (Linux): their addresses stay.
    """
    from gateloop_cpp.transformer import Transformer

    parameters = dict(model.named_parameters())
    embedding = parameters["token_emb.weight"]
    plain = all(
        type(p) is nn.Parameter and p.is_cpu and p.is_contiguous() and p.dtype == embedding.dtype
        for p in parameters.values()
    )
    known = type(model) is Transformer and all(
        (type(m) in _KNOWN or m is model) and not has_hooks(m) for m in model.modules()
    )
    max_heads = all(
        m.heads == m.dim_inner for m in model.modules() if isinstance(m, GateLoopedAttention)
    )
    ablated = model.ablate_complex or model.ablate_state_transition
    own = autocasts(embedding.device) or torch._C._are_functorch_transforms_active()
    if not (plain and known and max_heads) or ablated or own:
        return None

    post_norm = model.options["post_ln_norm"]
    names = ["token_emb.weight", "to_logits.0.gamma"]
    names.append("to_logits.weight" if post_norm else "to_logits.1.weight")
    for i in range(len(model.layers)):
        gain = "weight" if post_norm else "gamma"
        names += [f"layers.{i}.{name.format(gain)}" for name in _LAYER]
    weights = [parameters.get(name) for name in names]
    for weight in parameters.values():
        torch.ops.gateloop._move_to_large_pages(weight)
    sigmoid, normalize = model.options["gate"] == "sigmoid", model.options["normalize_input"]

    def step(ids: Tensor, cache: "Cache") -> tuple[Tensor, "Cache"]:
        result: Any = torch.ops.gateloop._transformer_step(
            ids, weights, list(cache), post_norm, sigmoid, normalize
        )
        logits, states = result
        return cast(Tensor, logits), tuple(states)

    return step
