"""Causal attention, over all steps or a window of them. Shapes: H heads of d channels, S keys."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, random

from gateloop_jax._blocks import Mixer, Norm, Recipe, drop_imaginary, scale_gradient, uniform
from gateloop_jax._gate_loop import polar_gate
from gateloop_jax._packing import Packing
from gateloop_jax._primitive import accumulation
from gateloop_jax._time_sharding import AxisName, steps_before
from gateloop_jax._weights import Layout, Weight, own, within


class KeysValues(NamedTuple):
    """What attention has read: with a window the last window - 1 steps, zeros before the first;
    without one all steps, in order, zeros behind the last."""

    keys: Array  # (B, H, S, d)
    values: Array  # (B, H, S, d)
    steps: Array  # (B) int32: how many were read


def frequencies(dim_head: int) -> Array:
    """(dim_head / 2), of RotaryEmbedding."""
    return 1 / 10000 ** (jnp.arange(0, dim_head, 2) / dim_head)


def widened(freqs: Array) -> Array:
    """In float32 at least. What is the rounding of a frequency above stands for that frequency: a
    position multiplies the difference."""
    wide = freqs.astype(accumulation(freqs.dtype))
    if wide.dtype == freqs.dtype:
        return wide
    exact = frequencies(2 * freqs.shape[-1]).astype(wide.dtype)
    return jnp.where(exact.astype(freqs.dtype) == freqs, exact, wide)


FREQUENCIES = Layout(lambda x: np.asarray(widened(jnp.asarray(x))), lambda x: x)


class RotaryEmbedding(eqx.Module):
    """Channels 2i and 2i + 1 turn together by position · 10000^(-2i / d)."""

    freqs: Array  # (d / 2), not trained: its gradient is zero; as widened() reads it

    def __call__(self, t: Array, positions: Array) -> Array:
        """t (B, H, T, d), positions (B or 1, T)."""
        freqs = lax.stop_gradient(self.freqs)
        angles = positions[:, None, :, None] * widened(freqs)
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        x, y = t[..., 0::2], t[..., 1::2]
        turned = jnp.stack([x * cos - y * sin, y * cos + x * sin], axis=-1)
        return turned.reshape(t.shape).astype(t.dtype)

    def weights(self) -> Iterator[Weight]:
        yield from own(self, "freqs", "freqs", layout=FREQUENCIES)


class Attention(Mixer):
    """o_i = Σ_{j ≤ i} w(q_i · k_j / √d) v_j, w the softmax over j or the identity.

    Then a SiLU gate, where there is a weight for it, and a projection.

    With `wa` each pair of channels c of a head has a transition a_c of its own step; q is scaled by
    max(Re(a_1 ... a_c), 1e-10) and k by the inverse, as in the PyTorch model.
    """

    norm: Norm
    rotary: RotaryEmbedding | None
    wq: Array  # (D, H d), as wk, wv, wa and wg
    wk: Array
    wv: Array
    wa: Array | None  # (re, im) interleaved
    wg: Array | None
    wo: Array  # (H d, D)
    bo: Array  # (D)
    heads: int = eqx.field(static=True)
    softmax_normalize: bool = eqx.field(static=True)
    window: int | None = eqx.field(static=True)
    frac_gradient_data_dependent_rel_pos: float = eqx.field(static=True)
    ablate_complex: bool = eqx.field(static=True)
    ablate_state_transition: bool = eqx.field(static=True)

    @staticmethod
    def make(
        recipe: Recipe,
        key: Array,
        *,
        heads: int,
        dim_head: int,
        rotary_emb: bool,
        data_dependent_rel_pos: bool,
        add_swish_gating: bool,
        **options: Any,
    ) -> "Attention":
        """The fields of AttentionSpec in include/gateloop/model.h."""
        dim, inner = recipe.dim, heads * dim_head
        q, k, v, a, g, o, bias = random.split(key, 7)
        return Attention(
            norm=recipe.norm(),
            rotary=RotaryEmbedding(frequencies(dim_head)) if rotary_emb else None,
            wq=recipe.matrix(q, dim, inner),
            wk=recipe.matrix(k, dim, inner),
            wv=recipe.matrix(v, dim, inner),
            wa=recipe.matrix(a, dim, inner) if data_dependent_rel_pos else None,
            wg=recipe.matrix(g, dim, inner) if add_swish_gating else None,
            wo=recipe.matrix(o, inner, dim),
            bo=uniform(bias, (dim,), inner),
            heads=heads,
            ablate_complex=recipe.ablate_complex,
            ablate_state_transition=recipe.ablate_state_transition,
            **options,
        )

    def weights(self) -> Iterator[Weight]:
        yield from within("0.norm.", ("norm",), self.norm)
        yield from within("0.fn.rotary_emb.", ("rotary",), self.rotary)
        yield from own(self, "0.fn.to_qkv.0.weight", "wq", "wk", "wv")
        yield from own(self, "0.fn.to_a.0.weight", "wa")
        yield from own(self, "0.fn.to_gates.0.weight", "wg")
        yield from own(self, "0.fn.to_out.1.weight", "wo")
        yield from own(self, "0.fn.to_out.1.bias", "bo")

    def make_state(self, batch: int, dtype: Any, length: int | None) -> KeysValues:
        kept = length if self.window is None else self.window - 1
        if kept is None:
            raise ValueError(
                "GateLoopTransformer: initial_state needs the length of the longest sequence for"
                " attention to all steps, got None"
            )
        zeros = jnp.zeros((batch, self.heads, kept, self.wq.shape[1] // self.heads), dtype)
        return KeysValues(zeros, zeros, jnp.zeros(batch, jnp.int32))

    def mix(
        self, x: Array, state: KeysValues | None, packing: Packing | None = None
    ) -> tuple[Array, KeysValues | None]:
        batch, time, _ = x.shape
        axis_name = None if packing is None else packing.axis_name
        if packing is not None and axis_name is not None:
            self._check_sharded(packing)
        if packing is not None and state is not None:
            raise ValueError(
                "Attention: state must be None with segment_ids, mask or axis_name, got one of"
                f" {state.keys.shape[0]} sequences"
            )
        q, k, v = (self._split(x @ w) for w in (self.wq, self.wk, self.wv))
        if state is not None:
            self._check(state, k)
        first = jnp.zeros(1, jnp.int32) if state is None else state.steps
        positions = first[:, None] + jnp.arange(time)
        if packing is not None:
            positions = packing.positions(time)
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        if self.wa is not None and not self.ablate_state_transition:
            scale = self._relative_scale(x, self.wa)
            q, k = _scale_pairs(q, scale), _scale_pairs(k, 1 / scale)
        if packing is None:
            y, state = self._attend(q, k, v, positions, state)
        elif axis_name is not None:
            y = self._attend_over(axis_name, q, k, v, positions)
        else:
            y = self._weigh(q, k, v, packing.visible(positions, self.window)[:, None])
        y = jnp.swapaxes(y, 1, 2).reshape(batch, time, self.wo.shape[0])
        if self.wg is not None:
            y = y * jax.nn.silu(x @ self.wg)
        return y @ self.wo + self.bo, state

    def _split(self, x: Array) -> Array:
        """(B, T, H d) -> (B, H, T, d)."""
        return jnp.swapaxes(x.reshape(*x.shape[:2], self.heads, x.shape[2] // self.heads), 1, 2)

    def _check(self, state: KeysValues, k: Array) -> None:
        batch, heads, time, channels = k.shape
        kept = state.keys.shape[2] if self.window is None else self.window - 1
        expected = (batch, heads, kept, channels), (batch, heads, kept, channels), (batch,)
        for name, shape, x in zip(KeysValues._fields, expected, state, strict=True):
            if x.shape != shape:
                raise ValueError(f"Attention: state.{name} must be {shape}, got shape {x.shape}")
        if self.window is None and time > kept:
            raise ValueError(
                f"Attention: state must have room for {time} steps, got a state of {kept}"
            )

    def _check_sharded(self, packing: Packing) -> None:
        if self.window is None:
            raise ValueError(
                "Attention: axis_name must be None for attention without a window: it would gather"
                f" all steps, got {packing.axis_name!r}"
            )
        if packing.mask is not None:
            raise ValueError(
                f"Attention: mask must be None over axis_name {packing.axis_name!r},"
                f" got one of shape {packing.mask.shape}"
            )

    def _relative_scale(self, x: Array, wa: Array) -> Array:
        """max(Re(a_1 ... a_c), 1e-10) for every pair of channels c of a head, (B, H, T, d / 2)."""
        z = scale_gradient(x @ wa, self.frac_gradient_data_dependent_rel_pos)
        if self.ablate_complex:
            z = drop_imaginary(z)
        return jnp.maximum(jnp.cumprod(polar_gate(self._split(z)), axis=-1).real, 1e-10)

    def _attend(
        self, q: Array, k: Array, v: Array, positions: Array, state: KeysValues | None
    ) -> tuple[Array, KeysValues | None]:
        time = q.shape[2]
        if self.window is not None and (state is not None or time > self.window):
            if state is None:
                state = self.make_state(q.shape[0], k.dtype, None)
            keys = jnp.concatenate([state.keys, k.astype(state.keys.dtype)], axis=2)
            values = jnp.concatenate([state.values, v.astype(state.values.dtype)], axis=2)
            y = self._attend_locally(q, keys, values, positions, self.window)
            return y, KeysValues(keys[:, :, time:], values[:, :, time:], state.steps + time)
        if state is not None:
            return self._attend_to_all(q, k, v, positions, state)
        return self._weigh(q, k, v, jnp.tril(jnp.ones((time, time), bool))), None

    def _attend_over(
        self, axis_name: AxisName, q: Array, k: Array, v: Array, positions: Array
    ) -> Array:
        """Of a block of the steps, behind the keys and values of the window - 1 steps before it."""
        assert self.window is not None
        window = max(1, min(self.window, lax.axis_size(axis_name) * q.shape[2]))
        both = jnp.concatenate([k, v], axis=1)  # one message to a neighbour
        both = jnp.concatenate([steps_before(both, window - 1, axis_name), both], axis=2)
        keys, values = jnp.split(both, 2, axis=1)
        return self._attend_locally(q, keys, values, positions, window)

    def _attend_to_all(
        self, q: Array, k: Array, v: Array, positions: Array, state: KeysValues
    ) -> tuple[Array, KeysValues]:
        room = state.keys.shape[2]
        keys = _write(state.keys, k, state.steps)
        values = _write(state.values, v, state.steps)
        steps = state.steps + q.shape[2]
        visible = jnp.arange(room) <= positions[..., None]
        y = self._weigh(q, keys, values, visible[:, None])
        # As JAX does out of bounds: not a number where the sequence is longer than the state.
        y = jnp.where((steps > room)[:, None, None, None], jnp.nan, y)
        return y, KeysValues(keys, values, steps)

    def _attend_locally(self, q: Array, k: Array, v: Array, positions: Array, window: int) -> Array:
        """k, v (B, H, window - 1 + T, d): of the window - 1 steps before too. A step reads those
        that its position, (B or 1, T), says are of its sequence."""
        attend = self._attend_in_blocks if q.shape[2] > window else self._attend_at_once
        return attend(q, k, v, positions, window)

    def _attend_at_once(self, q: Array, k: Array, v: Array, positions: Array, window: int) -> Array:
        lag = jnp.arange(q.shape[2])[:, None] + window - 1 - jnp.arange(k.shape[2])
        visible = (lag >= 0) & (lag <= jnp.minimum(positions, window - 1)[..., None])
        return self._weigh(q, k, v, visible[:, None])

    def _attend_in_blocks(
        self, q: Array, k: Array, v: Array, positions: Array, window: int
    ) -> Array:
        """The same by blocks of a window's steps, which read themselves and the block before:
        T · 2 window scores a head instead of T²."""
        time = q.shape[2]
        blocks = -(-time // window)
        missing = blocks * window - time

        def split(t: Array, before: int) -> Array:
            padded = jnp.pad(t, [(0, 0), (0, 0), (before, missing), (0, 0)])
            return padded.reshape(*t.shape[:2], padded.shape[2] // window, window, t.shape[3])

        def pairs(t: Array) -> Array:
            """(B, H, blocks, 2 window, d)."""
            whole = split(t, 1)
            return jnp.concatenate([whole[:, :, :-1], whole[:, :, 1:]], axis=3)

        key = jnp.arange(2 * window)
        lag = jnp.arange(window)[:, None] + window - key  # (window, 2 window)
        reach = jnp.pad(jnp.minimum(positions, window - 1), [(0, 0), (0, missing)])
        visible = (lag >= 0) & (lag <= reach.reshape(reach.shape[0], blocks, window)[..., None])
        y = self._weigh(split(q, 0), pairs(k), pairs(v), visible[:, None])
        return y.reshape(*q.shape[:2], blocks * window, q.shape[3])[:, :, :time]

    def _weigh(self, q: Array, k: Array, v: Array, visible: Array) -> Array:
        """q (..., T, d), k, v (..., S, d), visible bool, broadcast to (..., T, S)."""
        wide = accumulation(q.dtype)
        scores = jnp.einsum("...td,...sd->...ts", q, k, preferred_element_type=wide)
        scores = scores * q.shape[-1] ** -0.5
        if self.softmax_normalize:
            weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
        else:
            weights = jnp.where(visible, scores, 0)
        return (weights.astype(v.dtype) @ v).astype(q.dtype)


@jax.vmap
def _write(state: Array, t: Array, first: Array) -> Array:
    """t (H, T, d) into (H, S, d) from step `first` on."""
    return lax.dynamic_update_slice_in_dim(state, t.astype(state.dtype), first, axis=1)


def _scale_pairs(t: Array, factor: Array) -> Array:
    """t (..., d), factor (..., d / 2): each factor scales two neighbouring channels."""
    return (t * jnp.repeat(factor, 2, axis=-1)).astype(t.dtype)
