"""What takes part: problems, and the contenders that solve them."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

Kind = Literal["ours", "base", "peer", "floor"]
# The process that a contender runs in. Libraries with thread pools of their own stay apart. So do
# two revisions of our operators: no process can hold both.
Home = Literal["ours", "base", "definitions", "peer", "jax", "floor"]


class AbsentError(Exception):
    """A contender that cannot take part on this machine; the message says why."""


def import_or_absent(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as problem:
        raise AbsentError(str(problem)) from problem


@dataclass(frozen=True)
class Pass:
    """One thing that a contender does, with its inputs in place."""

    run: Callable[[], object]
    # Arrays to hold against the oracle's, as many as this pass computes; a floor computes none.
    result: Callable[[], list[Array]] | None = None
    # Or an error by a measure of its own, where arrays cannot be compared.
    error: Callable[[], float] | None = None
    # Seconds by the contender's own clock, where it is a program that also has to start.
    seconds: Callable[[], float] | None = None


@dataclass(frozen=True)
class Contender:
    name: str
    kind: Kind
    home: Home
    make: Callable[[Any], Mapping[str, Pass]]  # from the problem's inputs


@dataclass(frozen=True)
class Problem:
    group: str
    name: str
    tolerances: Mapping[str, float]  # of each pass
    inputs: Callable[[], Any]  # the same numbers in every process
    oracle: Callable[[Any], list[Array]]  # in float64
    contenders: Sequence[Contender]
    unit: Literal["seconds", "bytes"] = "seconds"
    work: int = 1  # how many things one pass makes, where the table shows throughput


def error(result: Sequence[Array], expected: Sequence[Array]) -> float:
    """Largest |result - expected| / |expected| of the arrays, in the Euclidean norm."""
    if len(result) > len(expected):
        raise ValueError(f"{len(result)} arrays to compare with {len(expected)} of the oracle")
    errors = []
    for one, other in zip(result, expected, strict=False):
        if one.size != other.size:
            raise ValueError(f"shape {one.shape} where the oracle has {other.shape}")
        norm = float(np.linalg.norm(other.ravel()))
        errors.append(float(np.linalg.norm(one.ravel() - other.ravel())) / norm)
    return float(np.max(errors))  # unlike max(), keeps NaN
