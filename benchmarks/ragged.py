"""64 packed sequences of different lengths, beside one sequence as long as all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from benchmarks import heads
from benchmarks.contenders import Array, Contender, Pass, Problem
from benchmarks.floors import floor
from benchmarks.operators import OPERATORS, PASSES, TOLERANCE, Inputs
from benchmarks.operators import inputs as operator_inputs
from benchmarks.torch_passes import expect_options, oracle_passes, our_package, torch_passes

SEQUENCES = 64


@dataclass(frozen=True)
class Case:
    """An operator, and its sequence of the total length."""

    name: str
    inputs: Callable[[], Inputs]
    passes: Callable[[Callable[..., Tensor], Inputs], dict[str, Pass]]
    oracle: Callable[[Inputs], list[Array]]  # of one sequence
    part: Callable[[Inputs, slice], Inputs]  # of some steps
    axis: int  # of time, in the oracle's arrays
    tolerance: float


def of_heads(shape: heads.Shape) -> Case:
    time, width = shape
    return Case(
        f"gate_loop (1, {time:,}, {heads.CHANNELS // width}, {width})",
        partial(heads.inputs, shape),
        heads.passes,
        heads.oracle,
        lambda data, steps: Inputs([x[steps] for x in data.arrays], data.gradient[steps]),
        0,
        heads.TOLERANCE,
    )


def of_channels(name: str, time: int, channels: int) -> Case:
    operator = OPERATORS[name]

    def passes(function: Callable[..., Tensor], data: Inputs) -> dict[str, Pass]:
        arrays = [x.reshape(*x.shape[:2], -1) for x in data.arrays]
        return torch_passes(function, arrays, data.gradient)

    def part(data: Inputs, steps: slice) -> Inputs:
        return Inputs([x[:, steps] for x in data.arrays], data.gradient[:, steps])

    return Case(
        f"{name} (1, {time:,}, {channels})",
        partial(operator_inputs, operator, (1, time, channels)),
        passes,
        lambda data: oracle_passes(operator.oracle, data.arrays, data.gradient),
        part,
        1,
        TOLERANCE,
    )


def ends(time: int) -> Array:
    """Where the sequences begin and end, (SEQUENCES + 1); some have a step, some a thousand."""
    inner = np.random.default_rng(7).choice(time - 1, SEQUENCES - 1, replace=False) + 1
    return np.array([0, *sorted(inner), time])


def packed(case: Case, name: str, cuts: Array, data: Inputs) -> dict[str, Pass]:
    operator = getattr(our_package().ops, name)
    expect_options(operator, "cu_seqlens")
    cu_seqlens = torch.from_numpy(cuts)
    return case.passes(lambda *leaves: operator(*leaves, cu_seqlens=cu_seqlens)[0], data)


def whole(case: Case, name: str, data: Inputs) -> dict[str, Pass]:
    operator = getattr(our_package().ops, name)
    made = case.passes(lambda *leaves: operator(*leaves)[0], data)
    return {which: Pass(one.run) for which, one in made.items()}  # another result than the oracle's


def oracle(case: Case, cuts: Array, data: Inputs) -> list[Array]:
    parts: Sequence[list[Array]] = [
        case.oracle(case.part(data, slice(begin, end))) for begin, end in pairwise(cuts)
    ]
    return [np.concatenate(arrays, case.axis) for arrays in zip(*parts, strict=True)]


def problem(case: Case, time: int) -> Problem:
    name, cuts = case.name.split()[0], ends(time)
    return Problem(
        "ragged",
        f"{SEQUENCES} packed sequences, {case.name}",
        dict.fromkeys(PASSES, case.tolerance),
        case.inputs,
        partial(oracle, case, cuts),
        [
            Contender("torch.ops.gateloop", "ours", "ours", partial(packed, case, name, cuts)),
            floor("one sequence", partial(whole, case, name)),
        ],
    )


def problems(quick: bool) -> list[Problem]:
    short, long = (96, 96) if quick else (8192, 65536)
    return [
        problem(of_heads((short, 64)), short),
        *(
            problem(of_channels(name, long, 16 if quick else 512), long)
            for name in ("linear_recurrence", "polar_gate_loop")
        ),
    ]
