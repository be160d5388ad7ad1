"""GateLoop between projections."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
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
from gateloop_jax._gate_loop import gate_loop, polar_gate_loop
from gateloop_jax._packing import Packing
from gateloop_jax._primitive import accumulation, to_complex
from gateloop_jax._transition import input_scale, transition_of
from gateloop_jax._weights import COLUMNS, PAIRS, Layout, Weight, own, within
from gateloop_jax._wide_heads import FeatureMap

Gate = Literal["polar", "sigmoid", "magnitude_phase"]


class GateLoop(Mixer):
    """Mixes in time, in H heads. Each has K = P / H channels of queries and keys and V = E / H of
    values. Each, or each of its keys, has a transition a_t:

        S_t = a_t S_{t-1} + k_t^T v_t   (K, V)        y_t = q_t Re(S_t)   (V)

    then a LayerNorm, a SiLU gate and a projection, where there are weights for them. With max
    heads, K = V = 1, and the polar gate that is one kernel.
    """

    norm: Norm
    wq: Array  # (D, P), as wk
    wk: Array
    wv: Array | None  # (D, E), as wg; none: v is one
    wa: Array  # (D, 2 A) of A transitions: the first numbers of all, then the second; or (D, A)
    wg: Array | None
    wo: Array | None  # (E, D)
    ba: Array | None  # (2 A) or (A)
    frac_gradient_state_transition: float = eqx.field(static=True)
    sub_ln: LayerNorm | None = None
    # Of one sequence, (E) with max heads, which are the default, or (H, keys, values).
    state_shape: tuple[int, ...] | None = eqx.field(static=True, default=None)
    gate: Gate = eqx.field(static=True, default="polar")
    normalize_input: bool | str = eqx.field(static=True, default=False)
    per_key_transitions: bool = eqx.field(static=True, default=False)
    feature_map: FeatureMap = eqx.field(static=True, default="none")
    # With wider heads: the backward pass computes the (B, T, H, K, V) states again.
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
        derived: Mapping[str, Any],
        dim_key: int | None = None,
        transition_bias: object = None,
        phase_bias: object = None,
        **options: Any,
    ) -> "GateLoop":
        """The fields of GateLoopSpec in include/gateloop/model.h."""
        dim, projects = recipe.dim, add_swish_gating or dim_inner != recipe.dim
        dim_key = dim_inner if dim_key is None else dim_key
        transitions, given = derived["transition_channels"], derived["initial_bias"]
        q, k, v, a, g, o, *bias = random.split(key, 6 if recipe.like_jax else 7)
        ba = uniform(bias[0], (transitions,), dim) if bias else None
        if given is not None:
            ba = jnp.asarray(_layout(gate).from_torch(np.asarray(given)), jnp.float32)
        return GateLoop(
            norm=recipe.norm(),
            wq=recipe.matrix(q, dim, dim_key),
            wk=recipe.matrix(k, dim, dim_key),
            wv=None if joint_kv else recipe.matrix(v, dim, dim_inner),
            wa=recipe.matrix(a, dim, transitions),
            wg=recipe.matrix(g, dim, dim_inner) if add_swish_gating else None,
            wo=recipe.matrix(o, dim_inner, dim) if projects else None,
            ba=ba,
            sub_ln=layer_norm(dim_inner) if sub_ln else None,
            state_shape=tuple(derived["state_shape"]),
            gate=gate,
            ablate_complex=recipe.ablate_complex,
            ablate_state_transition=recipe.ablate_state_transition,
            **options,
        )

    def weights(self) -> Iterator[Weight]:
        layout = _layout(self.gate)
        yield from within("0.norm.", ("norm",), self.norm)
        yield from own(self, "0.fn.to_qkv.weight", "wq", "wk", "wv")
        yield from own(self, "0.fn.to_a.0.weight", "wa", layout=layout)
        yield from own(self, "0.fn.to_a.0.bias", "ba", layout=layout)
        yield from within("0.fn.maybe_sub_ln.", ("sub_ln",), self.sub_ln)
        yield from own(self, "0.fn.to_gates.0.weight", "wg")
        yield from own(self, "0.fn.to_out.weight", "wo")

    def make_state(self, batch: int, dtype: Any, length: int | None) -> Array:
        """(B, E) with max heads, else (B, H, keys, values); real where all transitions are."""
        wide = accumulation(dtype) if self._is_real() else to_complex(dtype)
        return jnp.zeros((batch, *self._state_shape()), wide)

    def mix(
        self, x: Array, state: Array | None, packing: Packing | None = None
    ) -> tuple[Array, Array]:
        fused = len(self._state_shape()) == 1 and self.gate == "polar" and not self._is_real()
        read = self._read_fused if fused else self._read
        y, state = read(x, state, packing)
        if self.sub_ln is not None:
            y = self.sub_ln(y)
        if self.wg is not None:
            y = y * jax.nn.silu(x @ self.wg)
        return y if self.wo is None else y @ self.wo, state

    def _is_real(self) -> bool:
        return self.gate == "sigmoid" or self.ablate_state_transition

    def _state_shape(self) -> tuple[int, ...]:
        return self.state_shape or (self.wq.shape[1],)

    def _transition(self, x: Array) -> Array:
        """(B, T, 2 A), the two numbers of a transition side by side; or (B, T, A)."""
        z = scale_gradient(self._project(x), self.frac_gradient_state_transition)
        return drop_imaginary(z) if self.ablate_complex and self.gate != "sigmoid" else z

    def _project(self, x: Array) -> Array:
        if self.gate == "sigmoid":
            return x @ self.wa + (0 if self.ba is None else self.ba)
        bias = 0 if self.ba is None else interleave(self.ba)
        # What is interleaved is the smaller of the matrix and its product.
        if x.shape[0] * x.shape[1] < x.shape[2]:
            return interleave(x @ self.wa) + bias
        return x @ interleave(self.wa) + bias

    def _project_input(self, x: Array) -> tuple[Array, Array, Array]:
        """q and k (B, T, P), v (B, T, E)."""
        q, k = x @ self.wq, x @ self.wk
        return q, k, jnp.ones_like(k) if self.wv is None else x @ self.wv

    def _read_fused(
        self, x: Array, state: Array | None, packing: Packing | None
    ) -> tuple[Array, Array]:
        z = self._transition(x)
        q, k, v = self._project_input(x)
        if self.normalize_input is not False:
            k = (k * input_scale(z, self.gate, self.normalize_input)).astype(k.dtype)
        given = {} if packing is None else packing._asdict()
        return polar_gate_loop(q, k, v, z, state, **given)

    def _gates(self, x: Array) -> tuple[Array, Array | None]:
        """a (B, T, A), and what the recurrence's input is scaled by, if by anything."""
        wide = accumulation(x.dtype)
        if self.ablate_state_transition:
            # 1 - |a| would scale every input by zero: the sum stays plain.
            heads = self._state_shape()[0]
            return jnp.ones((*x.shape[:2], heads), wide), None
        z = self._transition(x)
        scales = self.normalize_input is not False
        scale = input_scale(z, self.gate, self.normalize_input) if scales else None
        return transition_of(z, self.gate), scale

    def _read(self, x: Array, state: Array | None, packing: Packing | None) -> tuple[Array, Array]:
        segments = None if packing is None else packing.num_segments
        of_each = () if segments is None else (segments,)
        state_shape = (x.shape[0], *of_each, *self._state_shape())
        if state is not None and state.shape != state_shape:
            raise ValueError(f"GateLoop: state must be {state_shape}, got shape {state.shape}")
        a, scale = self._gates(x)
        read: Callable[..., tuple[Array, Array]] = functools.partial(
            self._read_heads, packing=packing
        )
        if self.checkpoint_gate_looped_attn and len(self._state_shape()) > 1:
            read = jax.checkpoint(read)
        return read(*self._project_input(x), a, scale, state)

    def _read_heads(
        self,
        q: Array,
        k: Array,
        v: Array,
        a: Array,
        scale: Array | None,
        state: Array | None,
        packing: Packing | None,
    ) -> tuple[Array, Array]:
        """q, k (B, T, P), v (B, T, E), a and scale (B, T, A) -> y (B, T, E), the state."""
        heads, is_wide = self._state_shape()[0], len(self._state_shape()) > 1

        def in_heads(t: Array) -> Array:
            return t.reshape(*t.shape[:2], heads, -1) if is_wide else t

        q, k, v_ = in_heads(q), in_heads(k), in_heads(v)
        if scale is not None:
            k = (k * in_heads(scale)).astype(k.dtype)
        if self.feature_map == "taylor":
            q = q * q.shape[-1] ** -0.5
        a = in_heads(a) if self.per_key_transitions and a.shape[2] != heads else a
        given = {} if packing is None else packing._asdict()
        y, state = gate_loop(q, k, v_, a, state, feature_map=self.feature_map, **given)
        return y.reshape(v.shape), state


def _layout(gate: Gate) -> Layout:
    return COLUMNS if gate == "sigmoid" else PAIRS
