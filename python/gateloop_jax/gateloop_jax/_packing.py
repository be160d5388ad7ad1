"""Sequences of different lengths in one array.

Each function that reads a sequence takes three more arguments:

segment_ids: (B, T) integers: steps of one number, side by side, are a sequence. Where the number
    changes the state begins again at zero; the first sequence that is read continues from
    initial_state, and final_state is that of the last.
num_segments: N, with segment_ids: states are (B, N, ...), one for each of the numbers 0 to N - 1.
    A sequence of number n begins at initial_state[:, n]. final_state[:, n] is that of the last one
    read, the initial state where there is none. Of other numbers the initial state is zero, and
    the final one is dropped.
mask:        (B, T) bool, false at padding. A step of padding neither decays nor feeds the state,
    and its output is zero.
"""

from numbers import Integral
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from gateloop_jax._sharding import align_batch
from gateloop_jax._time_sharding import AxisName, before_block, largest_before, place_of


def _check_count(function: str, num_segments: int) -> None:
    if not isinstance(num_segments, Integral):
        raise TypeError(f"{function}: num_segments must be an int, got {num_segments!r}")
    if num_segments < 1:
        raise ValueError(f"{function}: num_segments must be at least 1, got {num_segments}")


class Packing(NamedTuple):
    """Given to the functions by these names. Of a model's layers it says too which axis shards
    time; the functions take that apart."""

    segment_ids: Array | None = None  # (B, T)
    mask: Array | None = None  # (B, T)
    axis_name: AxisName | None = None
    num_segments: int | None = None

    @staticmethod
    def of(
        function: str,
        shape: tuple[int, ...],
        segment_ids: ArrayLike | None,
        mask: ArrayLike | None,
        axis_name: AxisName | None = None,
        num_segments: int | None = None,
    ) -> "Packing | None":
        """Checked against (B, T); None where nothing is given."""
        if num_segments is not None and segment_ids is None:
            raise ValueError(
                f"{function}: num_segments must be None without segment_ids, got {num_segments}"
            )
        if num_segments is not None:
            _check_count(function, num_segments)
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
        return Packing(ids, real, axis_name, num_segments)

    def begins(
        self, reverse: bool = False, axis_name: AxisName | None = None, first: bool = False
    ) -> Array | None:
        """(B, T) bool: where the scan enters a sequence, its first too with `first`. With axis_name
        in a block of the steps, whose first may begin one too."""
        ids = self.segment_ids
        if ids is None:
            return None
        changes = ids[:, 1:] != ids[:, :-1]
        edge = jnp.full_like(ids[:, :1], first, bool)
        if axis_name is not None and ids.shape[1] > 0:
            before, exists = before_block(ids, axis_name, reverse)
            changed = before != ids[:, -1 if reverse else 0]
            edge = jnp.where(exists, changed[:, None], edge)
        return jnp.concatenate([changes, edge] if reverse else [edge, changes], axis=1)

    def transitions(self, a: Array, reverse: bool, axis_name: AxisName | None = None) -> Array:
        """a (B, T, ...): 1 at padding, 0 where a sequence begins."""
        a, begins = self.filled(a, 1), self.begins(reverse, axis_name)
        return a if begins is None else jnp.where(along(begins, a), 0, a)

    def filled(self, x: Array, value: ArrayLike = 0) -> Array:
        """x (B, T, ...) with `value` at padding, whatever it holds there."""
        return x if self.mask is None else jnp.where(along(self.mask, x), x, value)

    def rows(self) -> Array:
        """(B, T) int32: of which state of N a step is; N where it is of none."""
        assert self.segment_ids is not None and self.num_segments is not None
        ids, count = self.segment_ids, self.num_segments
        if ids.dtype.itemsize < 4:  # of 8 bits count would wrap
            ids = ids.astype(jnp.int32)
        return jnp.where((ids >= 0) & (ids < count), ids, count).astype(jnp.int32)

    def states_of_steps(self, states: Array) -> Array:
        """Of states (B, N, ...) those of each step, (B, T, ...)."""
        none = jnp.zeros_like(states[:, :1])
        return picked(jnp.concatenate([states, none], 1), self.rows())

    def places(self, reverse: bool, axis_name: AxisName | None) -> Array:
        """(B, T) int32: of each step in the order in which all are read."""
        rows = self.rows()
        time = rows.shape[1]
        first = 0 if axis_name is None else place_of(axis_name, reverse) * time
        steps = jnp.arange(time, dtype=jnp.int32)
        return jnp.broadcast_to(first + (steps[::-1] if reverse else steps), rows.shape)

    def last_places(self, reverse: bool, axis_name: AxisName | None) -> Array:
        """(B, N) int32: of the last step that is read of each number; below 0 where none is."""
        count = self.num_segments
        assert count is not None
        places = self.places(reverse, axis_name)
        none = jnp.full((places.shape[0], count + 1), -1, jnp.int32)
        given = align_batch(none, self.rows(), places)
        last = jax.vmap(lambda x, at, place: x.at[at].max(place))(*given)[:, :count]
        return last if axis_name is None else lax.pmax(last, axis_name)

    def after_last(
        self, h: Array, initial: Array, reverse: bool, axis_name: AxisName | None
    ) -> Array:
        """Of h (B, T, ...) the last that is read of each number, (B, N, ...), `initial` without."""
        last = self.last_places(reverse, axis_name)
        exists = along(last >= 0, initial)
        time = h.shape[1]
        if time == 0:
            return initial
        if axis_name is not None:
            last = last - place_of(axis_name, reverse) * time
        here = along((last >= 0) & (last < time), initial)
        after = picked(h, jnp.clip(time - 1 - last if reverse else last, 0, time - 1))
        if axis_name is not None:
            after = lax.psum(jnp.where(here, after, 0), axis_name)
        return jnp.where(exists, after, initial)

    def positions(self, time: int) -> Array:
        """(B or 1, T) int32: of each step among those of its sequence, padding not counted. Over an
        axis there is no mask."""
        real = jnp.ones((1, time), bool) if self.mask is None else self.mask
        place = jnp.cumsum(real, axis=1, dtype=jnp.int32) - real
        if self.axis_name is not None:
            place = place + lax.axis_index(self.axis_name) * time
        begins = self.begins(axis_name=self.axis_name)
        if begins is None:
            return place
        begin = jnp.where(begins, place, 0)
        first = lax.cummax(begin, axis=1)
        if self.axis_name is not None:
            last = jnp.max(begin, axis=1, initial=0)
            first = jnp.maximum(first, largest_before(last, self.axis_name)[:, None])
        return place - first

    def visible(self, positions: Array, window: int | None) -> Array:
        """(B, T, T) bool: of each step itself and those before it in its sequence that are no
        padding, at most `window` of them."""
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


def along(steps: Array, sequence: Array) -> Array:
    return steps.reshape(*steps.shape, *(1,) * (sequence.ndim - 2))


def picked(x: Array, places: Array) -> Array:
    """x (B, S, ...) at places (B, ...) of its second axis."""
    return jax.vmap(lambda x, at: x[at])(*align_batch(x, places))


def added_at(x: Array, places: Array, added: Array) -> Array:
    """x (B, S, ...) and what is added to it at places (B, ...) of its second axis."""
    return jax.vmap(lambda x, at, added: x.at[at].add(added))(*align_batch(x, places, added))
