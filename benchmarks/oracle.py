"""The slow definitions in float64 that every contender is held against.

A plain loop over time with its adjoint written out; the rest is autograd on top of it. Shapes are
(B, T, D).
"""

from collections.abc import Mapping
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


def linear_recurrence(a: Tensor, x: Tensor) -> Tensor:
    return recurrence(a, x)


def simple_gate_loop(q: Tensor, kv: Tensor, z: Tensor) -> Tensor:
    return q * recurrence(z.sigmoid(), kv)


def polar_gate_loop(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
    """z: (B, T, 2 D), (re, im) interleaved; a = σ(|z|) z/|z|."""
    pairs = z.unflatten(-1, (-1, 2))
    r = pairs.norm(dim=-1, keepdim=True)
    a = torch.view_as_complex(pairs * (r.sigmoid() / r))
    return q * recurrence(a, (k * v).to(torch.complex128)).real


def simple_gate_loop_layer(x: Tensor, gamma: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm, projection to q, kv, z, simple gate."""
    norm = F.normalize(x, dim=-1) * gamma * gamma.numel() ** 0.5
    q, kv, z = (norm @ weight.T).chunk(3, dim=-1)
    return simple_gate_loop(q, kv, z)


def transformer(weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """The GateLoop Transformer with max heads, swish gate and norms after the sums; its logits.

    `weights` go by the names that the reference package gives them.
    """

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    x = weights["token_emb.weight"][ids]
    depth = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers."))
    for layer in range(depth):
        attention, feed_forward = f"layers.{layer}.0", f"layers.{layer}.1"
        q, k, v = linear(f"{attention}.fn.to_qkv", x).chunk(3, dim=-1)
        z = linear(f"{attention}.fn.to_a.0", x)
        z = 0.9 * z + 0.1 * z.detach()  # frac_gradient_state_transition
        y = F.silu(linear(f"{attention}.fn.to_gates.0", x)) * polar_gate_loop(q, k, v, z)
        x = norm(f"{attention}.norm", linear(f"{attention}.fn.to_out", y) + x)
        hidden = F.gelu(linear(f"{feed_forward}.fn.0", x))
        x = norm(f"{feed_forward}.norm", linear(f"{feed_forward}.fn.2", hidden) + x)
    return linear("to_logits", x)
