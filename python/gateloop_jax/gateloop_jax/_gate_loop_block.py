"""GateLoop between projections."""

from collections.abc import Iterator
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, random

from gateloop_jax._blocks import (
    LayerNorm,
    Mixer,
    Norm,
    Recipe,
    drop_imaginary,
    interleave,
    layer_norm,
    scale_gradient,
    uniform,
)
from gateloop_jax._gate_loop import polar_gate, polar_gate_loop
from gateloop_jax._linear_recurrence import linear_recurrence
from gateloop_jax._primitive import accumulation, to_complex
from gateloop_jax._weights import COLUMNS, PAIRS, Weight, own, within

Gate = Literal["polar", "sigmoid"]


class GateLoop(Mixer):
    """Mixes in time, with d = E / H channels in each of H heads:

        S_t = a_t S_{t-1} + k_t^T v_t   (d, d)        y_t = q_t Re(S_t)   (d)

    then a LayerNorm, a SiLU gate and a projection, where there are weights for them. With max
    heads, d = 1, and the polar gate that is one kernel.
    """

    norm: Norm
    wq: Array  # (D, E), as wk, wv and wg
    wk: Array
    wv: Array | None  # none: v is one
    wa: Array  # (D, 2 H): real parts, then imaginary ones; (D, H) for the sigmoid gate
    wg: Array | None
    wo: Array | None  # (E, D)
    ba: Array | None  # (2 H) or (H)
    frac_gradient_state_transition: float = eqx.field(static=True)
    sub_ln: LayerNorm | None = None
    heads: int | None = eqx.field(static=True, default=None)  # by default max heads
    gate: Gate = eqx.field(static=True, default="polar")
    normalize_input: bool = eqx.field(static=True, default=False)
    # With d > 1: the backward pass computes the (B, T, H, d, d) states again.
    checkpoint_gate_looped_attn: bool = eqx.field(static=True, default=True)
    ablate_complex: bool = eqx.field(static=True, default=False)
    ablate_state_transition: bool = eqx.field(static=True, default=False)

    @staticmethod
    def make(
        recipe: Recipe,
        key: Array,
        *,
        dim_inner: int,
        heads: int,
        gate: Gate,
        joint_kv: bool,
        add_swish_gating: bool,
        sub_ln: bool,
        transition_bias: tuple[float, float] | None,
        **options: Any,
    ) -> "GateLoop":
        """The fields of GateLoopSpec in include/gateloop/model.h."""
        dim, projects = recipe.dim, add_swish_gating or dim_inner != recipe.dim
        transitions = heads * (2 if gate == "polar" else 1)
        q, k, v, a, g, o, *bias = random.split(key, 6 if recipe.like_jax else 7)
        ba = uniform(bias[0], (transitions,), dim) if bias else None
        return GateLoop(
            norm=recipe.norm(),
            wq=recipe.matrix(q, dim, dim_inner),
            wk=recipe.matrix(k, dim, dim_inner),
            wv=None if joint_kv else recipe.matrix(v, dim, dim_inner),
            wa=recipe.matrix(a, dim, transitions),
            wg=recipe.matrix(g, dim, dim_inner) if add_swish_gating else None,
            wo=recipe.matrix(o, dim_inner, dim) if projects else None,
            ba=ba if transition_bias is None else jnp.linspace(*transition_bias, heads),
            sub_ln=layer_norm(dim_inner) if sub_ln else None,
            heads=heads,
            gate=gate,
            ablate_complex=recipe.ablate_complex,
            ablate_state_transition=recipe.ablate_state_transition,
            **options,
        )

    def weights(self) -> Iterator[Weight]:
        layout = PAIRS if self.gate == "polar" else COLUMNS
        yield from within("0.norm.", ("norm",), self.norm)
        yield from own(self, "0.fn.to_qkv.weight", "wq", "wk", "wv")
        yield from own(self, "0.fn.to_a.0.weight", "wa", layout=layout)
        yield from own(self, "0.fn.to_a.0.bias", "ba", layout=layout)
        yield from within("0.fn.maybe_sub_ln.", ("sub_ln",), self.sub_ln)
        yield from own(self, "0.fn.to_gates.0.weight", "wg")
        yield from own(self, "0.fn.to_out.weight", "wo")

    def make_state(self, batch: int, dtype: Any, length: int | None) -> Array:
        """(B, E) with max heads, else (B, H, d, d); real where all transitions are."""
        wide = accumulation(dtype) if self._is_real() else to_complex(dtype)
        return jnp.zeros(self._state_shape(batch), wide)

    def mix(self, x: Array, state: Array | None) -> tuple[Array, Array]:
        fused = self._has_max_heads() and not self._is_real()
        y, state = self._read_fused(x, state) if fused else self._read(x, state)
        if self.sub_ln is not None:
            y = self.sub_ln(y)
        if self.wg is not None:
            y = y * jax.nn.silu(x @ self.wg)
        return y if self.wo is None else y @ self.wo, state

    def _heads(self) -> int:
        return self.heads or self.wq.shape[1]

    def _has_max_heads(self) -> bool:
        return self._heads() == self.wq.shape[1]

    def _is_real(self) -> bool:
        return self.gate == "sigmoid" or self.ablate_state_transition

    def _state_shape(self, batch: int) -> tuple[int, ...]:
        inner, heads = self.wq.shape[1], self._heads()
        d = inner // heads
        return (batch, inner) if self._has_max_heads() else (batch, heads, d, d)

    def _transition(self, x: Array) -> Array:
        """(B, T, 2 H), (re, im) interleaved per head as the kernel reads them; or (B, T, H)."""
        z = scale_gradient(self._project(x), self.frac_gradient_state_transition)
        return drop_imaginary(z) if self.ablate_complex and self.gate == "polar" else z

    def _project(self, x: Array) -> Array:
        if self.gate == "sigmoid":
            return x @ self.wa + (0 if self.ba is None else self.ba)
        bias = 0 if self.ba is None else interleave(self.ba)
        # What is interleaved is the smaller of the matrix and its product.
        if x.shape[0] * x.shape[1] < x.shape[2]:
            return interleave(x @ self.wa) + bias
        return x @ interleave(self.wa) + bias

    def _project_input(self, x: Array) -> tuple[Array, Array, Array]:
        """q, k and v, (B, T, E) each."""
        q, k = x @ self.wq, x @ self.wk
        return q, k, jnp.ones_like(k) if self.wv is None else x @ self.wv

    def _read_fused(self, x: Array, state: Array | None) -> tuple[Array, Array]:
        z = self._transition(x)
        return polar_gate_loop(*self._project_input(x), z, state)

    def _gates(self, x: Array) -> tuple[Array, Array | None]:
        """a (B, T, H), and what the recurrence's input is scaled by, if by anything."""
        wide = accumulation(x.dtype)
        if self.ablate_state_transition:
            # 1 - a would scale every input by zero: the sum stays plain.
            return jnp.ones((*x.shape[:2], self._heads()), wide), None
        z = self._transition(x)
        if self.gate == "polar":
            return polar_gate(z), None
        a = jax.nn.sigmoid(z.astype(wide))
        return a, 1 - a if self.normalize_input else None

    def _read(self, x: Array, state: Array | None) -> tuple[Array, Array]:
        shape = self._state_shape(x.shape[0])
        if state is not None and state.shape != shape:
            raise ValueError(f"GateLoop: state must be {shape}, got shape {state.shape}")
        a, scale = self._gates(x)
        read = _read_heads
        if self.checkpoint_gate_looped_attn and not self._has_max_heads():
            read = jax.checkpoint(read)
        y, state = read(*self._project_input(x), a, scale, state)
        return y, state.reshape(shape)


def _read_heads(
    q: Array, k: Array, v: Array, a: Array, scale: Array | None, state: Array | None
) -> tuple[Array, Array]:
    """q, k, v (B, T, E), a (B, T, H), state of B · H · d · d numbers -> y (B, T, E), (B, H d²)."""
    (batch, time, inner), heads = q.shape, a.shape[2]
    wide = accumulation(q.dtype)
    # (B, T, H, d) each
    wide_q, wide_k, wide_v = (
        t.astype(wide).reshape(batch, time, heads, inner // heads) for t in (q, k, v)
    )
    if scale is not None:
        wide_k = wide_k * scale[..., None]
    kv = (wide_k[..., :, None] * wide_v[..., None, :]).astype(a.dtype)
    everywhere = jnp.broadcast_to(a[..., None, None], kv.shape)
    initial = None if state is None else state.reshape(batch, -1)
    flat = (batch, time, heads * (inner // heads) ** 2)
    h, final = linear_recurrence(everywhere.reshape(flat), kv.reshape(flat), initial)
    y = jnp.sum(wide_q[..., None] * h.real.reshape(kv.shape), axis=-2)
    return y.reshape(q.shape).astype(q.dtype), final
