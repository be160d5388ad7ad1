"""The compiled handlers: where they lie, and their registration with XLA."""

import ctypes
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


def register() -> None:
    library = ctypes.CDLL(str(path()))
    for name in NAMES:
        handler = jax.ffi.pycapsule(getattr(library, f"gateloop_jax_{name}"))
        jax.ffi.register_ffi_target(target(name), handler, platform="cpu")
        jax.ffi.register_ffi_target_as_batch_partitionable(target(name))


def target(name: str) -> str:
    return f"gateloop_{name}"
