"""XLA's handlers called with buffers that gateloop_jax would not give: an error, never a crash."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gateloop_jax import _library  # registers the handlers

B, T, D = 2, 20, 3
S, PAIRS, STATE, SAVED = (B, T, D), (B, T, D, 2), (B, D), (B, 2, D)
# Two heads of 3 keys and 4 values, with a transition for each key.
KEYS, VALUES, HEADS, SAVED_HEADS = (B, T, 2, 3), (B, T, 2, 4), (B, 2, 3, 4), (B, 2, 2, 2, 3, 4)
Buffer = tuple[str, tuple[int, ...], str]


def real(names: str, shape: tuple[int, ...] = S) -> list[Buffer]:
    return [(name, shape, "float32") for name in names.split()]


def complex_(name: str, shape: tuple[int, ...] = STATE) -> Buffer:
    return name, shape, "complex64"


# Handler -> its arguments and its results. The first of x, a and q is what others are judged by.
HANDLERS: dict[str, tuple[list[Buffer], list[Buffer]]] = {
    "linear_recurrence": (
        [*real("a x"), *real("initial_state", STATE)],
        [*real("h"), *real("final_state", STATE)],
    ),
    "linear_recurrence_backward": (
        [*real("a h"), *real("initial_state", STATE), *real("dh"), *real("dfinal_state", STATE)],
        [*real("da dx"), *real("dinitial_state", STATE)],
    ),
    "polar_gate_loop": (
        [*real("q k v"), *real("z", PAIRS), complex_("initial_state")],
        [*real("y"), complex_("final_state"), complex_("saved_states", SAVED)],
    ),
    "polar_gate_loop_backward": (
        [*real("q k v"), *real("z", PAIRS), complex_("saved_states", SAVED), *real("dy"),
         complex_("dfinal_state")],
        [*real("dq dk dv"), *real("dz", PAIRS), complex_("dinitial_state")],
    ),
    "simple_gate_loop": (
        [*real("q kv z"), *real("initial_state", STATE)],
        [*real("y"), *real("final_state", STATE), *real("saved_states", SAVED)],
    ),
    "simple_gate_loop_backward": (
        [*real("q kv z"), *real("saved_states", SAVED), *real("dy"), *real("dfinal_state", STATE)],
        [*real("dq dkv dz"), *real("dinitial_state", STATE)],
    ),
    "gate_loop": (
        [*real("q k", KEYS), *real("v", VALUES), complex_("a", KEYS),
         complex_("initial_state", HEADS)],
        [*real("y", VALUES), complex_("final_state", HEADS), *real("saved_states", SAVED_HEADS)],
    ),
    "gate_loop_backward": (
        [*real("q k", KEYS), *real("v", VALUES), complex_("a", KEYS),
         *real("saved_states", SAVED_HEADS), *real("dy", VALUES), complex_("dfinal_state", HEADS)],
        [*real("dq dk", KEYS), *real("dv", VALUES), complex_("da", KEYS),
         complex_("dinitial_state", HEADS)],
    ),
}  # fmt: skip
# What others are judged by: their own errors are those of others.
JUDGES = {
    "linear_recurrence": ["x"],
    "linear_recurrence_backward": ["a"],
    "gate_loop": ["q", "v", "a"],
    "gate_loop_backward": ["q", "v", "a"],
}


def call(handler: str, arguments: list[Buffer], results: list[Buffer]) -> Any:
    function = jax.ffi.ffi_call(
        f"gateloop_{handler}", [jax.ShapeDtypeStruct(s, jnp.dtype(d)) for _, s, d in results]
    )
    given = [jnp.zeros(shape, dtype) for _, shape, dtype in arguments]
    option = "taylor" if handler in _library.CPU_NAMES else "time_last"
    return jax.block_until_ready(function(*given, reverse=np.bool_(0), **{option: np.bool_(0)}))


def changed(buffer: Buffer, how: str) -> Buffer:
    name, shape, dtype = buffer
    if how == "dtype":
        return name, shape, "int32"
    if how == "rank":
        return name, shape[1:], dtype
    # One entry too few along time, saved states or channels.
    axis = 1
    return name, (*shape[:axis], shape[axis] - 1, *shape[axis + 1 :]), dtype


@pytest.mark.parametrize("handler", HANDLERS)
def test_what_fits_is_computed(handler: str) -> None:
    assert len(call(handler, *HANDLERS[handler])) == len(HANDLERS[handler][1])


@pytest.mark.parametrize("how", ["dtype", "rank", "size"])
@pytest.mark.parametrize("handler", HANDLERS)
def test_every_buffer_is_checked(handler: str, how: str) -> None:
    arguments, results = HANDLERS[handler]
    buffers = arguments + results
    judges = JUDGES.get(handler, ["q"])
    for i, buffer in enumerate(buffers):
        if buffer[0] in judges and how != "dtype":
            continue  # then all others are wrong
        wrong = [changed(b, how) if j == i else b for j, b in enumerate(buffers)]
        with pytest.raises(Exception, match=f"gateloop: {handler}: {buffer[0]} must be .*, got "):
            call(handler, wrong[: len(arguments)], wrong[len(arguments) :])


def test_a_judge_of_too_few_axes() -> None:
    arguments, results = HANDLERS["linear_recurrence"]
    wrong = [(n, (3,) if n == "x" else s, d) for n, s, d in arguments]
    with pytest.raises(Exception, match="x must have 2 axes or more, got F32 \\(3\\)"):
        call("linear_recurrence", wrong, results)


def test_heads_of_too_few_axes() -> None:
    arguments, results = HANDLERS["gate_loop"]
    wrong = [(n, (3, 4) if n == "q" else s, d) for n, s, d in arguments]
    with pytest.raises(Exception, match="q must have 3 axes or more, got F32 \\(3, 4\\)"):
        call("gate_loop", wrong, results)


def test_complex_sequences_of_a_gate() -> None:
    arguments, results = HANDLERS["polar_gate_loop"]
    wrong = [(n, s, "complex64") for n, s, _ in arguments]
    with pytest.raises(Exception, match="q must be F32, F64, BF16 or F16, got C64"):
        call("polar_gate_loop", wrong, results)


def test_too_many_results() -> None:
    arguments, results = HANDLERS["polar_gate_loop"]
    with pytest.raises(Exception, match="results must be 2 or 3"):
        call("polar_gate_loop", arguments, [*results, results[-1]])


@pytest.mark.skipif(
    "cuda" not in _library.platforms("linear_recurrence"), reason="the library has no CUDA handlers"
)
@pytest.mark.parametrize("handler", [*_library.NAMES, *(f"{name}_step" for name in _library.STEPS)])
def test_cuda_handlers_bind_the_same_buffers(handler: str) -> None:
    """Called on the CPU, they lack the CUDA stream, operand 0, and nothing else."""
    symbol = getattr(_library._load(), f"gateloop_jax_{handler}_cuda")
    name = f"{handler}_of_cuda_on_cpu"
    jax.ffi.register_ffi_target(f"gateloop_{name}", jax.ffi.pycapsule(symbol), platform="cpu")
    arguments, results = HANDLERS[handler.removesuffix("_step")]
    with pytest.raises(Exception, match=r"\(bad operands at: 0\)(?s:.*)platform stream"):
        call(name, arguments, results)
    with pytest.raises(Exception, match="Wrong number of arguments"):
        call(name, arguments[1:], results)
