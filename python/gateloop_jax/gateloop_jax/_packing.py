"""Sequences of different lengths in one array.

Each function that reads a sequence takes two more arguments, both or either:

segment_ids: (B, T) integers: steps of one number, side by side, are a sequence. Where the number
    changes the state begins again at zero; the first sequence that is read continues from
    initial_state, and final_state is that of the last.
mask:        (B, T) bool, false at padding. A step of padding neither decays nor feeds the state,
    and its output is zero.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from gateloop_jax._time_sharding import AxisName, before_block


class Packing(NamedTuple):
    """Given to the functions by these names. Of a model's layers it says too which axis shards
    time; the functions take that apart."""

    segment_ids: Array | None = None  # (B, T)
    mask: Array | None = None  # (B, T)
    axis_name: AxisName | None = None

    @staticmethod
    def of(
        function: str,
        shape: tuple[int, ...],
        segment_ids: ArrayLike | None,
        mask: ArrayLike | None,
        axis_name: AxisName | None = None,
    ) -> "Packing | None":
        """Checked against (B, T); None where nothing is given."""
        if segment_ids is None and mask is None and axis_name is None:
            return None
        ids = None if segment_ids is None else jnp.asarray(segment_ids)
        real = None if mask is None else jnp.asarray(mask)
        for name, given, kind, what in (
            ("segment_ids", ids, jnp.integer, "integers"),
            ("mask", real, jnp.bool_, "bool"),
        ):
            if given is None:
                continue
            if given.shape != shape or not jnp.issubdtype(given.dtype, kind):
                raise ValueError(
                    f"{function}: {name} must be {what} of shape {shape},"
                    f" got {given.dtype} of shape {given.shape}"
                )
        return Packing(ids, real, axis_name)

    def begins(self, reverse: bool = False) -> Array | None:
        """(B, T) bool: where the scan enters a sequence that is not its first."""
        if self.segment_ids is None:
            return None
        changes = self.segment_ids[:, 1:] != self.segment_ids[:, :-1]
        edge = jnp.zeros_like(self.segment_ids[:, :1], bool)
        return jnp.concatenate([changes, edge] if reverse else [edge, changes], axis=1)

    def transitions(self, a: Array, reverse: bool, axis_name: AxisName | None = None) -> Array:
        """a (B, T, ...): 1 at padding, 0 where a sequence begins; with axis_name in a block of
        them, whose first step may begin one too."""
        a, begins = self.filled(a, 1), self.begins(reverse)
        if axis_name is not None and begins is not None and begins.shape[1] > 0:
            assert self.segment_ids is not None
            first = -1 if reverse else 0
            before, exists = before_block(self.segment_ids, axis_name, reverse)
            begins = begins.at[:, first].set(exists & (before != self.segment_ids[:, first]))
        return a if begins is None else jnp.where(_along(begins, a), 0, a)

    def filled(self, x: Array, value: ArrayLike = 0) -> Array:
        """x (B, T, ...) with `value` at padding, whatever it holds there."""
        return x if self.mask is None else jnp.where(_along(self.mask, x), x, value)

    def positions(self) -> Array:
        """(B, T) int32: of each step among those of its sequence, padding not counted."""
        shape = next(t.shape for t in (self.segment_ids, self.mask) if t is not None)
        real = jnp.ones(shape, bool) if self.mask is None else self.mask
        before = jnp.cumsum(real, axis=1, dtype=jnp.int32) - real
        begins = self.begins()
        if begins is None:
            return before
        return before - lax.cummax(jnp.where(begins, before, 0), axis=1)

    def visible(self, window: int | None) -> Array:
        """(B, T, T) bool: of each step itself and those before it in its sequence that are no
        padding, at most `window` of them."""
        positions = self.positions()
        time = positions.shape[1]
        seen = jnp.tril(jnp.ones((time, time), bool))[None]
        begins = self.begins()
        if begins is not None:
            sequence = jnp.cumsum(begins, axis=1)
            seen = seen & (sequence[:, :, None] == sequence[:, None])
        if self.mask is not None:
            seen = seen & self.mask[:, None]
        if window is not None:
            seen = seen & (positions[:, :, None] - positions[:, None] < window)
        # Padding attends to itself: a softmax over nothing is not a number.
        return seen | jnp.eye(time, dtype=bool)


def _along(steps: Array, sequence: Array) -> Array:
    return steps.reshape(*steps.shape, *(1,) * (sequence.ndim - 2))
