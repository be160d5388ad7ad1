"""The compiled library: where it lies, its handlers for XLA, and its description of models."""

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import jax

NAMES = (
    "linear_recurrence",
    "linear_recurrence_backward",
    "polar_gate_loop",
    "polar_gate_loop_backward",
    "simple_gate_loop",
    "simple_gate_loop_backward",
)
# On the CPU alone, of heads. XLA does not partition them.
CPU_NAMES = ("gate_loop", "gate_loop_backward")
# On CUDA these have a handler of one step too. It takes no scratch, so that XLA may replay it as
# part of a CUDA graph; the others take scratch, which is other memory in every call.
STEPS = ("linear_recurrence", "polar_gate_loop", "simple_gate_loop")


def path() -> Path:
    """GATELOOP_JAX_LIBRARY, else beside these files (installed), else the checkout's release."""
    here = Path(__file__).resolve().parent
    if named := os.environ.get("GATELOOP_JAX_LIBRARY"):
        places = [Path(named)]
    else:
        file = "libgateloop_jax.so"
        places = [here / file, here.parents[2] / "build" / "release" / "lib" / file]
    for place in places:
        if place.is_file():
            return place
    raise ImportError(
        "gateloop_jax: its library of kernels is missing; looked for "
        + ", ".join(map(str, places))
        + ". In a checkout, 'make build' makes it; GATELOOP_JAX_LIBRARY names another place."
    )


@functools.cache
def _load() -> ctypes.CDLL:
    return ctypes.CDLL(str(path()))


def platforms(name: str) -> tuple[str, ...]:
    """JAX's names of those that have this handler: a build without nvcc has no CUDA's."""
    return ("cpu", "cuda") if hasattr(_load(), f"gateloop_jax_{name}_cuda") else ("cpu",)


def register() -> None:
    steps = [f"{name}_step" for name in STEPS]
    for name in [*NAMES, *CPU_NAMES]:
        _register(name, f"gateloop_jax_{name}", "cpu")
    if "cuda" in platforms(NAMES[0]):
        for name in [*NAMES, *steps]:
            _register(name, f"gateloop_jax_{name}_cuda", "CUDA")
    for name in [*NAMES, *steps]:
        jax.ffi.register_ffi_target_as_batch_partitionable(f"gateloop_{name}")


def _register(name: str, symbol: str, platform: str) -> None:
    """`platform`: XLA's name of it."""
    handler = jax.ffi.pycapsule(getattr(_load(), symbol))
    jax.ffi.register_ffi_target(f"gateloop_{name}", handler, platform=platform)


def target(name: str, platform: str, time: Any) -> str:
    """The name of the handler for sequences of `time` steps, which may be symbolic."""
    step = platform == "cuda" and name in STEPS and isinstance(time, int) and time == 1
    return f"gateloop_{name}_step" if step else f"gateloop_{name}"


def call_text(name: str, *words: str) -> str:
    """The result of a function of src/jax/model.cpp; ValueError with its message where it fails."""
    function = getattr(_load(), f"gateloop_jax_{name}")
    function.restype = ctypes.c_char_p
    failed = ctypes.c_bool()
    arguments = [word.encode() for word in words]
    answer = str(function(*arguments, ctypes.byref(failed)).decode(errors="replace"))
    if failed:
        raise ValueError(answer)
    return answer
