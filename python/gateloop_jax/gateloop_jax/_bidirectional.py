"""A scan in both directions of time."""

from collections.abc import Callable, Sequence
from typing import Any

from jax import Array
from jax.typing import ArrayLike


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

    scan:           linear_recurrence, gate_loop or polar_gate_loop.
    forward:        its sequences in order, e.g. (q, k, v, a).
    backward:       those that the reverse scan reads, in the order of time too, with outputs of the
                    same shape; default: the same.
    initial_states: of the forward scan, before the first step, and of the reverse one, after the
                    last.
    options:        segment_ids, mask, axis_name and all else that `scan` takes, the same for both.
                    Packed sequences do not read each other. Of them the first alone begins at the
                    forward scan's initial state, the last alone at that of the reverse one; the
                    final states are those of the last and of the first. The output at padding is
                    zero.
    Returns (the sum of the outputs, (the state of the forward scan after the last step, that of the
    reverse one after the first)).
    """
    if "reverse" in options:
        raise ValueError("bidirectional: reverse must not be given, it runs both directions")
    if "initial_state" in options:
        raise ValueError(
            "bidirectional: initial_state must not be given, initial_states takes one a direction"
        )
    if not isinstance(initial_states, (tuple, list)) or len(initial_states) != 2:
        got = type(initial_states).__name__
        if isinstance(initial_states, (tuple, list)):
            got += f" of {len(initial_states)}"
        raise ValueError(
            "bidirectional: initial_states must be a tuple of two, of the forward and of the"
            f" reverse scan, got {got}"
        )
    given = (forward, forward if backward is None else backward)
    (y, after_last), (y_back, after_first) = (
        scan(*sequences, initial_state=state, reverse=reverse, **options)
        for sequences, state, reverse in zip(given, initial_states, (False, True), strict=True)
    )
    if y.shape != y_back.shape:
        raise ValueError(
            "bidirectional: backward must have outputs of the same shape as forward,"
            f" {y.shape}, got {y_back.shape}"
        )
    return y + y_back, (after_last, after_first)
