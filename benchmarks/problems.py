"""All problems, in the order in which they are measured."""

from benchmarks import (
    definitions,
    generation,
    heads,
    layer,
    memory,
    model,
    operators,
    ragged,
    time_sharding,
)
from benchmarks.contenders import Problem


def all_problems(quick: bool) -> list[Problem]:
    return [
        *operators.problems(quick),
        *heads.problems(quick),
        *ragged.problems(quick),
        *time_sharding.problems(quick),
        *layer.problems(quick),
        *model.problems(quick),
        *generation.problems(quick),
        *definitions.problems(quick),
        *operators.growth(quick),
        *memory.problems(quick),
    ]
