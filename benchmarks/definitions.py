"""Operators, a layer and a model by their definitions in torch's operators, which serve devices
without kernels, beside the reference's. Forced on the CPU, in a process of their own.
"""

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks import layer, model, operators
from benchmarks.contenders import Contender, Pass, Problem
from benchmarks.environment import ROOT
from benchmarks.operators import OPERATORS
from benchmarks.torch_passes import our_package

GROUP = "definitions"
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


def by_definitions(problem: Problem) -> Problem:
    """The same problem, for ours by the definitions and the reference alone."""
    makes = {contender.name: contender.make for contender in problem.contenders}
    ours, theirs = problem.contenders[0].make, makes["gateloop-transformer"]
    return replace(problem, contenders=both(ours, theirs))


def of_model(size: model.Size) -> Problem:
    def make(module: Callable[..., Any]) -> Make:
        return partial(model.training_passes, module, size, 1, False, dtypes=("float32",))

    return Problem(
        GROUP,
        f"training step, {size.batch * size.length:,} tokens",
        {"float32": model.TOLERANCES["float32"]},
        partial(model.inputs, size, size.batch, size.length + 1),
        model.training_oracle,
        both(make(model.ours), make(model.theirs)),
    )


def problems(quick: bool) -> list[Problem]:
    shapes = [(2, 96, 16)] if quick else [(1, 16384, 512), (8, 1024, 512)]
    return [
        *(
            by_definitions(operators.problem(GROUP, operator, shape, False, False))
            for operator in OPERATORS.values()
            for shape in shapes
        ),
        *(by_definitions(layer.problem(GROUP, *shape, False)) for shape in shapes),
        of_model(model.QUICK if quick else model.FULL),
    ]
