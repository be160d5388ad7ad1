"""GateLoop as a spatial mixer."""

from typing import Literal, cast

import torch
from torch import Tensor, nn

from gateloop_cpp import _spec
from gateloop_cpp._checks import (
    expect,
    expect_packing,
    expect_positive,
    expect_sequence,
    expect_wide,
)
from gateloop_cpp._packing import Packing
from gateloop_cpp.distributed import Group, Recurrences, recurrences
from gateloop_cpp.transition import drop_imaginary, input_scale, scale_gradient, transition_of

_NAME = "GateLoopedAttention"

Gate = Literal["polar", "sigmoid", "magnitude_phase"]
NormalizeInput = bool | Literal["none", "mean", "variance"]
FeatureMap = Literal["none", "taylor"]


class GateLoopedAttention(nn.Module):
    """GateLoop between projections (arXiv 2311.01927, section 3.2).

    With K = dim_key / heads, V = dim_inner / heads and a transition a_t for each head, or for each
    of its keys,

        S_t = a_t S_{t-1} + k_t^T v_t   (K, V)        y_t = q_t Re(S_t)   (V)

    then sub-LN, swish gating and the output projection. With max heads (K = V = 1, the default) the
    recurrence is one fused operator. It reads q, k, v and z in place. With the magnitude_phase gate
    it is a scan of computed transitions instead. Wider heads are one
    :func:`~gateloop_cpp.ops.gate_loop`.

    Args:
        dim: channels of the input and output.
        heads: default max heads, dim_inner of them.
        dim_inner: default dim.
        checkpoint_gate_looped_attn: kept for the reference's sake. Its states are computed again in
            the backward pass in either case: memory holds one of every 64 steps.
        add_swish_gating: multiply by SiLU of a projection of x.
        sub_ln: a LayerNorm after the recurrence.
        frac_gradient_state_transition: the share of the gradient that reaches ``to_a``.
        gate: what a is made of by a projection of x. "polar", σ(|z|) z/|z|, the reference's, with
            |a| in [0.5, 1); "magnitude_phase", σ(m) e^{iθ}, the paper's, with |a| in (0, 1) and a
            phase of its own; "sigmoid", σ(z), real, one projected channel a head instead of two.
            This and what follows is not in the reference.
        normalize_input: scale the recurrence's input by 1 - |a| (True or "mean"), or by
            √(1 - |a|²) ("variance").
        transition_bias: initial bias of what σ takes, spread evenly over [first, second] across the
            transitions (not with the polar gate).
        joint_kv: one projection to the recurrence's input kv instead of one to k and one to v (max
            heads only); ``to_qkv`` then has 2 dim_inner rows.
        dim_key: width of the keys of all heads, and of the queries; default dim_inner.
        per_key_transitions: a transition for every key channel instead of one for every head.
        feature_map: "taylor": q and k become their Taylor features (arXiv 2312.04927). Their
            products are then 1 + s + s²/2 with s = q · k / √K. Meant for K of 8 to 24: the state
            has 1 + K + K (K + 1) / 2 keys.
        phase_bias: initial bias of the phases in radians, within [first, second)
            (magnitude_phase gate only). Alike magnitudes get unlike phases.
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
        gate: Gate = "polar",
        normalize_input: NormalizeInput = False,
        transition_bias: tuple[float, float] | None = None,
        joint_kv: bool = False,
        dim_key: int | None = None,
        per_key_transitions: bool = False,
        feature_map: FeatureMap = "none",
        phase_bias: tuple[float, float] | None = None,
    ) -> None:
        options = {k: v for k, v in locals().items() if k not in ("self", "dim", "__class__")}
        # Absent, they follow from one another.
        for width in ("heads", "dim_inner"):
            if options[width] is None:
                del options[width]
        super().__init__()
        expect_positive(_NAME, dim=dim)
        spec = _spec.describe_layer(dim, "gate_loop", **options)
        derived, normalize = spec["derived"], spec["normalize_input"]

        self.dim = dim
        self.heads: int = spec["heads"]
        self.dim_inner: int = spec["dim_inner"]
        self.dim_key = self.dim_inner if dim_key is None else dim_key
        self.checkpoint_gate_looped_attn = checkpoint_gate_looped_attn
        self.frac_gradient_state_transition = frac_gradient_state_transition
        self.gate = gate
        self.normalize_input = {True: "mean", False: "none"}.get(normalize, normalize)
        self.joint_kv = joint_kv
        self.per_key_transitions = per_key_transitions
        self.feature_map = feature_map
        #: Of one sequence: (dim_inner) with max heads, else (heads, keys, values).
        self.state_shape: tuple[int, ...] = tuple(derived["state_shape"])

        keys = self.dim_key * (1 if joint_kv else 2)
        self.to_qkv = nn.Linear(dim, keys + self.dim_inner, bias=False)
        to_a = nn.Linear(dim, derived["transition_channels"])
        if derived["initial_bias"] is not None:
            with torch.no_grad():
                to_a.bias.copy_(torch.tensor(derived["initial_bias"], dtype=torch.float64))
        # The reference keeps some layers inside a Sequential, which shows in the parameter names.
        self.to_a = nn.Sequential(to_a)
        self.maybe_sub_ln = nn.LayerNorm(self.dim_inner) if sub_ln else nn.Identity()
        self.to_gates = (
            nn.Sequential(nn.Linear(dim, self.dim_inner, bias=False), nn.SiLU())
            if add_swish_gating
            else None
        )
        projects = self.dim_inner != dim or add_swish_gating
        self.to_out = nn.Linear(self.dim_inner, dim, bias=False) if projects else nn.Identity()

    def forward(
        self,
        x: Tensor,
        ablate_complex: bool = False,
        ablate_state_transition: bool = False,
        cache: Tensor | None = None,
        return_cache: bool = False,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        time_group: Group | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x (B, T, dim) to (B, T, dim), and with return_cache the cache that continues from here.

        Args:
            x: (B, T, dim), floating point.
            ablate_complex: drop the second number of the raw transition: im or the phase.
            ablate_state_transition: a_t = 1.
            cache: the state of the recurrence, (B, dim_inner) with max heads, (B, heads, K, V)
                otherwise: complex, or real for the sigmoid gate and under ablate_state_transition.
                A sequence cut anywhere and carried through its cache gives what one call gives.
            cu_seqlens, mask: packed or padded sequences, see :mod:`gateloop_cpp.ops`. Each of N
                packed sequences has a row of the cache. The outputs at padding have no meaning.
            time_group: the processes that hold a block of time each, see
                :mod:`gateloop_cpp.distributed`; the cache is then that of the whole.

        Raises:
            ValueError, TypeError: for an x or a cache of another shape or dtype.
        """
        expect_sequence(_NAME, x, self.dim)
        expect_packing(_NAME, x, cu_seqlens, mask, of_block=time_group is not None)
        self._check_cache(cache, x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        packing = Packing(cu_seqlens=cu_seqlens, mask=mask)
        mix = self._max_heads if len(self.state_shape) == 1 else self._wide_heads
        scans = recurrences(time_group)
        y, state = mix(x, ablate_complex, ablate_state_transition, cache, packing, scans)
        y = self.maybe_sub_ln(y)
        y = self.to_out(self._gated(x, y))
        return (y, state) if return_cache else y

    def _gated(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.to_gates is None else cast(Tensor, self.to_gates(x) * y)

    def _check_cache(self, cache: Tensor | None, sequences: int) -> None:
        if cache is None:
            return
        shape = (sequences, *self.state_shape)
        expect(cache.shape == shape, _NAME, "cache", str(shape), cache)
        expect_wide(_NAME, "cache", cache)

    def _transition(self, x: Tensor, ablate_complex: bool) -> Tensor:
        """The raw transitions, (B, T, transitions) or two numbers each."""
        z = scale_gradient(self.to_a(x), self.frac_gradient_state_transition)
        return drop_imaginary(z) if ablate_complex and self.gate != "sigmoid" else z

    def _scaled(self, value: Tensor, z: Tensor) -> Tensor:
        """The recurrence's input as normalize_input scales it.

        value: k (B, T, H, K), or with max heads k or k v (B, T, D).
        """
        if self.normalize_input == "none":
            return value
        scale = input_scale(z, self.gate, self.normalize_input)
        if value.ndim == 4:
            per_key = self.per_key_transitions
            scale = scale.unflatten(-1, (self.heads, -1)) if per_key else scale.unsqueeze(-1)
        return (value * scale).to(value.dtype)

    def _max_heads(
        self,
        x: Tensor,
        ablate_complex: bool,
        ablate_state_transition: bool,
        cache: Tensor | None,
        packing: Packing,
        scans: Recurrences,
    ) -> tuple[Tensor, Tensor]:
        if self.joint_kv:
            q, k = self.to_qkv(x).chunk(2, dim=-1)
            v = k.new_ones(()).expand_as(k)
        else:
            q, k, v = self.to_qkv(x).chunk(3, dim=-1)
        if ablate_state_transition:
            # With a = 1, normalize_input would scale every input by zero: the sum stays plain.
            kv = k if self.joint_kv else k * v
            h, state = scans.linear_recurrence(kv.new_ones(()).expand_as(kv), kv, cache, **packing)
            return q * h, state
        z, dtype = self._transition(x, ablate_complex), q.dtype
        if z.dtype != dtype:  # as of an adapter or a gate kept in float32
            wide = torch.promote_types(z.dtype, dtype)
            q, k, v, z = (t.to(wide) for t in (q, k, v, z))
        if self.gate == "sigmoid":
            kv, mean = k if self.joint_kv else k * v, self.normalize_input == "mean"
            kv = kv if mean else self._scaled(kv, z)
            y, state = scans.simple_gate_loop(q, kv, z, cache, normalize_input=mean, **packing)
        elif self.gate == "polar":
            y, state = scans.polar_gate_loop(q, self._scaled(k, z), v, z, cache, **packing)
        else:
            a = transition_of(z, self.gate)
            y, state = scans.gate_loop(q, self._scaled(k, z), v, a, cache, **packing)
        return y.to(dtype), state

    def _wide_heads(
        self,
        x: Tensor,
        ablate_complex: bool,
        ablate_state_transition: bool,
        cache: Tensor | None,
        packing: Packing,
        scans: Recurrences,
    ) -> tuple[Tensor, Tensor]:
        widths = (self.dim_key, self.dim_key, self.dim_inner)
        q, k, v = (t.unflatten(-1, (self.heads, -1)) for t in self.to_qkv(x).split(widths, dim=-1))
        if ablate_state_transition:
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            a = q.new_ones((), dtype=wide).expand(q.shape[:3])
        else:
            z = self._transition(x, ablate_complex)
            a = transition_of(z, self.gate)
            if self.per_key_transitions:
                a = a.unflatten(-1, (self.heads, -1))
            k = self._scaled(k, z)
        if self.feature_map == "taylor":
            q = q * q.shape[-1] ** -0.5
        y, state = scans.gate_loop(q, k, v, a, cache, feature_map=self.feature_map, **packing)
        return y.flatten(-2), state
