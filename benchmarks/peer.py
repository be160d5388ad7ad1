"""The reference package, imported without what it says of torch.jit."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from gateloop_transformer import SimpleGateLoopLayer, Transformer
    from gateloop_transformer.associative_scan import associative_scan
    from gateloop_transformer.gateloop_transformer import gate_loop_operator
    from gateloop_transformer.simplified_gate_loop import binary_operator
    from gateloop_transformer.simplified_gate_loop import (
        gate_loop_operator as simple_gate_loop_operator,
    )

__all__ = [
    "SimpleGateLoopLayer",
    "Transformer",
    "associative_scan",
    "binary_operator",
    "gate_loop_operator",
    "simple_gate_loop_operator",
]
