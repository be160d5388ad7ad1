"""GateLoop on C++ kernels, under the names of the reference package ``gateloop-transformer``.

>>> from gateloop_cpp import SimpleGateLoopLayer, Transformer

The modules take the reference's arguments and state_dicts. ``gateloop_cpp.ops`` has the recurrences
alone, ``gateloop_cpp.distributed`` the same over processes that hold a block of time each.
``gateloop_cpp.checkpoint`` reads and writes the model directories of the C++ trainer.
"""

from gateloop_cpp import _library, checkpoint, distributed, ops
from gateloop_cpp.causal_full_attention import CausalFullAttention
from gateloop_cpp.decoder import Decoder, DecoderState
from gateloop_cpp.fusion import fuse, unfuse
from gateloop_cpp.gate_looped_attention import GateLoopedAttention
from gateloop_cpp.sampling import Sampler
from gateloop_cpp.simple_gate_loop_layer import SimpleGateLoopLayer
from gateloop_cpp.transformer import Transformer

__version__ = _library.VERSION

__all__ = [
    "CausalFullAttention",
    "Decoder",
    "DecoderState",
    "GateLoopedAttention",
    "Sampler",
    "SimpleGateLoopLayer",
    "Transformer",
    "checkpoint",
    "distributed",
    "fuse",
    "ops",
    "unfuse",
]
