"""A scan in both directions of time."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import Array
from jax.typing import ArrayLike

from gateloop_jax._directions import both_directions


def bidirectional(
    scan: Callable[..., tuple[Array, Array]],
    forward: Sequence[ArrayLike],
    backward: Sequence[ArrayLike] | None = None,
    initial_states: tuple[ArrayLike | None, ArrayLike | None] = (None, None),
    **options: Any,
) -> tuple[Array, tuple[Array, Array]]:
    """The sum of a scan from the first step on and one from the last step on, as encoders read.

    y, (after_last, after_first) = bidirectional(gate_loop, (q, k, v, a), (q, k, v, a_backward))

    Every step reads all others, and itself once per direction: where no other step has an input,
    the output is twice that of `scan`.

    scan:           linear_recurrence, gate_loop, polar_gate_loop or simple_gate_loop.
    forward:        its sequences in order, e.g. (q, k, v, a).
    backward:       those that the reverse scan reads, in the order of time too, with outputs of the
                    same shape; default: the same.
    initial_states: of the forward scan, before the first step, and of the reverse one, after the
                    last.
    options:        segment_ids, mask, axis_name and all else that `scan` takes, the same for both.
                    Packed sequences do not read each other. Of them the first alone begins at the
                    forward scan's initial state. The last alone begins at that of the reverse one.
                    The final states are those of the last and of the first. With num_segments
                    each has states of its own in both. The output at padding is zero.
    Returns (the sum of the outputs, (state of the forward scan, state of the reverse one)). These
    are the states after the last and after the first step.
    """
    return both_directions(scan, forward, backward, initial_states, options)
