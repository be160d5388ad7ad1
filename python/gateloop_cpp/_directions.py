"""A scan in both directions of time, whichever library's arrays it takes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


def both_directions(
    scan: Callable[..., tuple[Any, Any]],
    forward: Sequence[Any],
    backward: Sequence[Any] | None,
    initial_states: tuple[Any, Any],
    options: Mapping[str, Any],
) -> tuple[Any, tuple[Any, Any]]:
    """`bidirectional` of gateloop_cpp.ops and of gateloop_jax, which say what the arguments are."""
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
            f" {tuple(y.shape)}, got {tuple(y_back.shape)}"
        )
    return y + y_back, (after_last, after_first)
