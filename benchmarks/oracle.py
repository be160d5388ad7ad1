"""The slow definitions in float64 that every contender is held against.

A plain loop over time with its adjoint written out; the rest is autograd on top of it. Shapes are
(B, T, D).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class Recurrence(torch.autograd.Function):
    """h_t = a_t h_{t-1} + x_t."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor) -> Tensor:
        h = torch.empty_like(x)
        # numpy's views cost a fifth of torch's, and there is one for every step.
        out, transition, into = h.numpy(), a.detach().numpy(), x.detach().numpy()
        state = into[:, 0] * 0
        for t in range(x.shape[1]):
            state = transition[:, t] * state + into[:, t]
            out[:, t] = state
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """g_t = dh_t + conj(a_{t+1}) g_{t+1}, dx_t = g_t, da_t = g_t conj(h_{t-1})."""
        a, h = ctx.saved_tensors
        dx = gradients[0].clone(memory_format=torch.contiguous_format)
        g, transition = dx.numpy(), a.detach().resolve_conj().numpy()
        for t in range(dx.shape[1] - 2, -1, -1):
            g[:, t] += transition[:, t + 1].conj() * g[:, t + 1]
        da = torch.zeros_like(dx)
        da[:, 1:] = dx[:, 1:] * h[:, :-1].conj()
        return da, dx


def recurrence(a: Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(Recurrence.apply(a, x))  # type: ignore[no-untyped-call]


def simple_gate_loop(q: Tensor, kv: Tensor, z: Tensor) -> Tensor:
    return q * recurrence(z.sigmoid(), kv)


def polar_gate_loop(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
    """z: (B, T, 2 D), (re, im) interleaved; a = σ(|z|) z/|z|."""
    pairs = z.unflatten(-1, (-1, 2))
    r = pairs.norm(dim=-1, keepdim=True)
    a = torch.view_as_complex(pairs * (r.sigmoid() / r))
    return q * recurrence(a, (k * v).to(torch.complex128)).real


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    return F.normalize(x, dim=-1) * gamma * gamma.numel() ** 0.5


def simple_gate_loop_layer(x: Tensor, gamma: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm, projection to q, kv, z, simple gate."""
    q, kv, z = (rms_norm(x, gamma) @ weight.T).chunk(3, dim=-1)
    return simple_gate_loop(q, kv, z)


def transformer(weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """The logits of a Transformer with max heads and swish gate, whose weights say the rest: that
    of the reference, with norms after the sums; or that of the `quick` preset, with norms before
    the layers, real transitions, input scaled by 1 - a, simple gate loops.

    `weights` go by the names that the packages give them.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def mixed(name: str, x: Tensor) -> Tensor:
        q, k, v = linear(f"{name}.to_qkv", x).chunk(3, dim=-1)
        z = linear(f"{name}.to_a.0", x)
        z = 0.9 * z + 0.1 * z.detach()  # frac_gradient_state_transition
        if z.shape == q.shape:
            y = simple_gate_loop(q, (-z).sigmoid() * k * v, z)
        else:
            y = polar_gate_loop(q, k, v, z)
        return linear(f"{name}.to_out", F.silu(linear(f"{name}.to_gates.0", x)) * y)

    def fed_forward(name: str, x: Tensor) -> Tensor:
        return linear(f"{name}.2", F.gelu(linear(f"{name}.0", x)))

    def added(layer: str, function: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
        """The layer in its residual connection."""
        gamma = weights.get(f"{layer}.norm.gamma")
        if gamma is None:
            return norm(f"{layer}.norm", function(f"{layer}.fn", x) + x)
        return function(f"{layer}.fn", rms_norm(x, gamma)) + x

    x = weights["token_emb.weight"][ids]
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    for layer in range(depth):
        attention, feed_forward, simple = (f"layers.{layer}.{i}" for i in range(3))
        if f"{simple}.norm.gamma" in weights:
            parameters = (f"{simple}.norm.gamma", f"{simple}.to_qkva.0.weight")
            x = x + simple_gate_loop_layer(x, *(weights[name] for name in parameters))
        x = added(feed_forward, fed_forward, added(attention, mixed, x))
    if "to_logits.weight" in weights:
        return linear("to_logits", x)
    return linear("to_logits.1", rms_norm(x, weights["to_logits.0.gamma"]))
