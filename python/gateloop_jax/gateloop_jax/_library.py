"""The compiled library: where it lies, its handlers' registration with XLA, and what it answers."""

import ctypes
import functools
import os
from pathlib import Path

import jax

NAMES = (
    "linear_recurrence",
    "linear_recurrence_backward",
    "polar_gate_loop",
    "polar_gate_loop_backward",
)


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


def register() -> None:
    for name in NAMES:
        handler = jax.ffi.pycapsule(getattr(_load(), f"gateloop_jax_{name}"))
        jax.ffi.register_ffi_target(target(name), handler, platform="cpu")
        jax.ffi.register_ffi_target_as_batch_partitionable(target(name))


def target(name: str) -> str:
    return f"gateloop_{name}"


def ask(name: str, *words: str) -> str:
    """What a function of src/jax/model.cpp answers; ValueError with what it says is wrong."""
    function = getattr(_load(), f"gateloop_jax_{name}")
    function.restype = ctypes.c_char_p
    failed = ctypes.c_bool()
    arguments = [word.encode() for word in words]
    answer = str(function(*arguments, ctypes.byref(failed)).decode(errors="replace"))
    if failed:
        raise ValueError(answer)
    return answer
