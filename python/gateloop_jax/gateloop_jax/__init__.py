"""GateLoop in JAX: the kernels through XLA's foreign function interface, and an Equinox model."""

from gateloop_jax import _library

_library.register()

from gateloop_jax._checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from gateloop_jax._gate_loop import gate_loop, polar_gate, polar_gate_loop  # noqa: E402
from gateloop_jax._linear_recurrence import linear_recurrence  # noqa: E402
from gateloop_jax._model import FeedForward, GateLoop, GateLoopTransformer, RMSNorm  # noqa: E402

__all__ = [
    "FeedForward",
    "GateLoop",
    "GateLoopTransformer",
    "RMSNorm",
    "gate_loop",
    "linear_recurrence",
    "load_checkpoint",
    "polar_gate",
    "polar_gate_loop",
    "save_checkpoint",
]
