"""Operators, a layer and a model by their definitions in torch's operators, which serve devices
without kernels, beside the reference's. Forced on the CPU, in a process of their own.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

from benchmarks import layer, model, operators, oracle
from benchmarks.contenders import Contender, Pass, Problem
from benchmarks.environment import ROOT
from benchmarks.operators import OPERATORS, Operator, Shape
from benchmarks.torch_passes import oracle_passes, our_package

Make = Callable[[Any], Mapping[str, Pass]]
_forced = ExitStack()  # left at the end of the process


def on_definitions(make: Make, data: Any) -> Mapping[str, Pass]:
    our_package()  # registers the kernels that are replaced
    sys.path.append(str(ROOT / "tests" / "python"))
    import composite

    _forced.enter_context(composite.forced())
    return make(data)


def both(ours: Make, theirs: Make) -> list[Contender]:
    return [
        Contender("definitions", "ours", "definitions", partial(on_definitions, ours)),
        Contender("gateloop-transformer", "peer", "peer", theirs),
    ]


def of_operator(operator: Operator, shape: Shape) -> Problem:
    return Problem(
        "definitions",
        f"{operator.name} ({', '.join(f'{n:,}' for n in shape)})",
        dict.fromkeys(operators.PASSES, operators.TOLERANCE),
        partial(operators.inputs, operator, shape),
        lambda data: oracle_passes(operator.oracle, data.arrays, data.gradient),
        both(
            partial(operators.ours, operator),
            partial(operators.torch_peer, operator, "peer", False, shape),
        ),
    )


def of_layer(batch: int, time: int, dim: int) -> Problem:
    return Problem(
        "definitions",
        f"SimpleGateLoopLayer({dim}) on ({batch}, {time:,}, {dim})",
        dict.fromkeys(layer.PASSES, layer.TOLERANCE),
        partial(layer.inputs, batch, time, dim),
        lambda data: oracle_passes(oracle.simple_gate_loop_layer, data.arrays, data.gradient),
        both(
            partial(layer.module_passes, layer.ours, False, dim),
            partial(layer.module_passes, layer.theirs, False, dim),
        ),
    )


def of_model(size: model.Size) -> Problem:
    def make(module: Callable[..., Any]) -> Make:
        return partial(model.training_passes, module, size, 1, False, dtypes=("float32",))

    return Problem(
        "definitions",
        f"training step, {size.batch * size.length:,} tokens",
        {"float32": model.TOLERANCES["float32"]},
        partial(model.inputs, size, size.batch, size.length + 1),
        model.training_oracle,
        both(make(model.ours), make(model.theirs)),
    )


def problems(quick: bool) -> list[Problem]:
    shapes = [(2, 96, 16)] if quick else [(1, 16384, 512), (8, 1024, 512)]
    return [
        *(of_operator(operator, shape) for operator in OPERATORS.values() for shape in shapes),
        *(of_layer(*shape) for shape in shapes),
        of_model(model.QUICK if quick else model.FULL),
    ]
