"""GateLoop as a spatial mixer."""

from typing import Literal

import torch
from torch import Tensor, nn

from gateloop_cpp._checks import expect, expect_packing, expect_positive, expect_sequence
from gateloop_cpp._packing import Packing
from gateloop_cpp.ops import gate_loop, linear_recurrence, polar_gate_loop, simple_gate_loop
from gateloop_cpp.transition import drop_imaginary, polar_gate, scale_gradient

_NAME = "GateLoopedAttention"


class GateLoopedAttention(nn.Module):
    """GateLoop between projections (arXiv 2311.01927, section 3.2).

    With d = dim_inner / heads and one transition a_t per head,

        S_t = a_t S_{t-1} + k_t^T v_t   (d, d)        y_t = q_t Re(S_t)   (d)

    then sub-LN, swish gating and the output projection. With max heads (d = 1, the default) the
    recurrence is one fused operator that reads q, k, v and z in place; with d > 1 it scans d²
    channels a head.

    Args:
        dim: channels of the input and output.
        heads: default max heads, dim_inner of them.
        dim_inner: default dim.
        checkpoint_gate_looped_attn: kept for the reference's sake. Its states are computed again in
            the backward pass in either case: memory holds one of every 64 steps with d > 1.
        add_swish_gating: multiply by SiLU of a projection of x.
        sub_ln: a LayerNorm after the recurrence.
        frac_gradient_state_transition: the share of the gradient that reaches ``to_a``.
        gate: "polar", a = σ(|z|) z/|z|, the reference's; or "sigmoid", a = σ(z), real, one
            projected channel a head instead of two. This and what follows is not in the reference.
        normalize_input: scale the recurrence's input by 1 - a_t (sigmoid gate only).
        transition_bias: initial bias of ``to_a``, spread evenly over [first, second] across heads
            (sigmoid gate only).
        joint_kv: one projection to the recurrence's input kv instead of one to k and one to v (max
            heads only); ``to_qkv`` then has 2 dim_inner rows.
    """

    def __init__(
        self,
        dim: int,
        heads: int | None = None,
        dim_inner: int | None = None,
        checkpoint_gate_looped_attn: bool = True,
        add_swish_gating: bool = True,
        sub_ln: bool = False,
        frac_gradient_state_transition: float = 0.9,
        *,
        gate: Literal["polar", "sigmoid"] = "polar",
        normalize_input: bool = False,
        transition_bias: tuple[float, float] | None = None,
        joint_kv: bool = False,
    ) -> None:
        super().__init__()
        dim_inner = dim if dim_inner is None else dim_inner
        heads = dim_inner if heads is None else heads
        expect_positive(_NAME, dim=dim, dim_inner=dim_inner, heads=heads)
        expect(dim_inner % heads == 0, _NAME, "heads", f"a divisor of dim_inner {dim_inner}", heads)
        expect(gate in ("polar", "sigmoid"), _NAME, "gate", '"polar" or "sigmoid"', gate)
        for option, value in (
            ("normalize_input", normalize_input or None),
            ("transition_bias", transition_bias),
        ):
            unused = gate == "sigmoid" or value is None
            expect(unused, _NAME, option, "left out with the polar gate", value)
        max_heads = heads == dim_inner
        expect(max_heads or not joint_kv, _NAME, "joint_kv", "False without max heads", joint_kv)

        self.dim = dim
        self.heads = heads
        self.dim_inner = dim_inner
        self.checkpoint_gate_looped_attn = checkpoint_gate_looped_attn
        self.frac_gradient_state_transition = frac_gradient_state_transition
        self.gate = gate
        self.normalize_input = normalize_input
        self.joint_kv = joint_kv

        self.to_qkv = nn.Linear(dim, dim_inner * (2 if joint_kv else 3), bias=False)
        to_a = nn.Linear(dim, heads * (2 if gate == "polar" else 1))
        if transition_bias is not None:
            with torch.no_grad():
                to_a.bias.copy_(torch.linspace(*transition_bias, heads))
        # The reference keeps some layers inside a Sequential, which shows in the parameter names.
        self.to_a = nn.Sequential(to_a)
        self.maybe_sub_ln = nn.LayerNorm(dim_inner) if sub_ln else nn.Identity()
        self.to_gates = (
            nn.Sequential(nn.Linear(dim, dim_inner, bias=False), nn.SiLU())
            if add_swish_gating
            else None
        )
        projects = dim_inner != dim or add_swish_gating
        self.to_out = nn.Linear(dim_inner, dim, bias=False) if projects else nn.Identity()

    def forward(
        self,
        x: Tensor,
        ablate_complex: bool = False,
        ablate_state_transition: bool = False,
        cache: Tensor | None = None,
        return_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, T, dim) to (B, T, dim), and with return_cache the cache that continues from here.

        Args:
            x: (B, T, dim), floating point.
            ablate_complex: drop the imaginary part of the raw transition.
            ablate_state_transition: a_t = 1.
            cache: the state of the recurrence, (B, dim_inner) with max heads, (B, heads, d, d)
                otherwise: complex, or real for the sigmoid gate and under ablate_state_transition.
                A sequence cut anywhere and carried through its cache gives what one call gives.
            cu_seqlens, mask: packed or padded sequences, see :mod:`gateloop_cpp.ops`. Each of N
                packed sequences has a row of the cache. What comes out at padding says nothing.

        Raises:
            ValueError, TypeError: for an x or a cache of another shape or dtype.
        """
        expect_sequence(_NAME, x, self.dim)
        expect_packing(_NAME, x, cu_seqlens, mask)
        self._check_cache(cache, x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        packing = Packing(cu_seqlens=cu_seqlens, mask=mask)
        mix = self._max_heads if self.heads == self.dim_inner else self._wide_heads
        y, state = mix(x, ablate_complex, ablate_state_transition, cache, packing)
        y = self.maybe_sub_ln(y)
        if self.to_gates is not None:
            y = self.to_gates(x) * y
        y = self.to_out(y)
        return (y, state) if return_cache else y

    def _check_cache(self, cache: Tensor | None, sequences: int) -> None:
        if cache is None:
            return
        d = self.dim_inner // self.heads
        shape = (sequences, self.dim_inner) if d == 1 else (sequences, self.heads, d, d)
        expect(cache.shape == shape, _NAME, "cache", str(shape), cache)

    def _transition(self, x: Tensor, ablate_complex: bool) -> Tensor:
        """The raw transition: (B, T, 2 heads), or (B, T, heads) for the sigmoid gate."""
        z = scale_gradient(self.to_a(x), self.frac_gradient_state_transition)
        return drop_imaginary(z) if ablate_complex and self.gate == "polar" else z

    def _max_heads(
        self,
        x: Tensor,
        ablate_complex: bool,
        ablate_state_transition: bool,
        cache: Tensor | None,
        packing: Packing,
    ) -> tuple[Tensor, Tensor]:
        if self.joint_kv:
            q, k = self.to_qkv(x).chunk(2, dim=-1)
            v = k.new_ones(()).expand_as(k)
        else:
            q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        if ablate_state_transition:
            # With a = 1, normalize_input would scale every input by zero: the sum stays plain.
            kv = k if self.joint_kv else k * v
            h, state = linear_recurrence(kv.new_ones(()).expand_as(kv), kv, cache, **packing)
            return q * h, state
        z, dtype = self._transition(x, ablate_complex), q.dtype
        if z.dtype != dtype:  # as of an adapter or a gate kept in float32
            wide = torch.promote_types(z.dtype, dtype)
            q, k, v, z = (t.to(wide) for t in (q, k, v, z))
        if self.gate == "polar":
            y, state = polar_gate_loop(q, k, v, z, cache, **packing)
        else:
            normalize = self.normalize_input
            kv = k if self.joint_kv else k * v
            y, state = simple_gate_loop(q, kv, z, cache, normalize_input=normalize, **packing)
        return y.to(dtype), state

    def _wide_heads(
        self,
        x: Tensor,
        ablate_complex: bool,
        ablate_state_transition: bool,
        cache: Tensor | None,
        packing: Packing,
    ) -> tuple[Tensor, Tensor]:
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        if ablate_state_transition:
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            a = q.new_ones((), dtype=wide).expand(q.shape[:3])
        elif self.gate == "polar":
            a = polar_gate(self._transition(x, ablate_complex))
        else:
            z = self._transition(x, ablate_complex)
            a = (z if z.dtype == torch.float64 else z.float()).sigmoid()
            if self.normalize_input:
                k = (k * (1 - a).unsqueeze(-1)).to(k.dtype)

        y, state = gate_loop(q, k, v, a, cache, **packing)
        return y.flatten(-2), state
