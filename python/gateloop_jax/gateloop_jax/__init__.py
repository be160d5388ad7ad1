"""GateLoop in JAX: the kernels through XLA's foreign function interface, and an Equinox model."""

from gateloop_jax import _library

_library.register()

from gateloop_jax._attention import Attention, KeysValues  # noqa: E402
from gateloop_jax._bidirectional import bidirectional  # noqa: E402
from gateloop_jax._blocks import FeedForward, LayerNorm, RMSNorm  # noqa: E402
from gateloop_jax._checkpoint import load_checkpoint, save_checkpoint  # noqa: E402
from gateloop_jax._gate_loop import (  # noqa: E402
    gate_loop,
    gate_loop_step,
    polar_gate,
    polar_gate_loop,
)
from gateloop_jax._gate_loop_block import GateLoop  # noqa: E402
from gateloop_jax._linear_recurrence import linear_recurrence  # noqa: E402
from gateloop_jax._model import GateLoopTransformer  # noqa: E402
from gateloop_jax._simple_gate_loop import SimpleGateLoop, simple_gate_loop  # noqa: E402

__all__ = [
    "Attention",
    "FeedForward",
    "GateLoop",
    "GateLoopTransformer",
    "KeysValues",
    "LayerNorm",
    "RMSNorm",
    "SimpleGateLoop",
    "bidirectional",
    "gate_loop",
    "gate_loop_step",
    "linear_recurrence",
    "load_checkpoint",
    "polar_gate",
    "polar_gate_loop",
    "save_checkpoint",
    "simple_gate_loop",
]
