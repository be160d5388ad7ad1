"""Synthetic tasks: a sequence of tokens, a target at every step, and the span that it needs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.records import Form

IGNORED = -100  # a target that nothing is asked of: as in torch's cross_entropy


@dataclass(frozen=True)
class Batch:
    tokens: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORED where there is none
    spans: Tensor  # (B, T) int64: how many steps back the target looks


@dataclass(frozen=True)
class Task:
    name: str
    definition: str
    num_tokens: int  # of inputs and targets together
    length: int
    batch: int  # sequences of a step
    steps: dict[Form, int]
    draw: Callable[[int, torch.Generator], Batch]  # so many sequences
    edges: tuple[int, ...]  # of the spans' ranges: accuracy within (edge, next edge]

    def ranges(self) -> list[tuple[int, int]]:
        return list(zip(self.edges, self.edges[1:], strict=False))


# ---- Memory Horizon -----------------------------------------------------------------------------

NUMBERS = 5
RESET = NUMBERS


def memory_horizon(
    sequences: int, length: int, reset_probability: float, generator: torch.Generator
) -> Batch:
    """Numbers 0..4 and resets; the target is the sum modulo 5 of all numbers since the last reset.

    After arXiv 2311.01927, section 5, which has number tokens and reset tokens. Its target
    compresses all inputs since the last reset. Sequences begin with a reset; any other step is one
    with the given probability. At a reset the target is 0 and the span 0; n steps after it the
    span is n.
    """
    shape = (sequences, length)
    numbers = torch.randint(NUMBERS, shape, generator=generator)
    resets = torch.rand(shape, generator=generator) < reset_probability
    resets[:, :1] = True
    summands = numbers.masked_fill(resets, 0)
    steps = torch.arange(length).expand(shape)
    last = torch.where(resets, steps, 0).cummax(1).values
    sums = summands.cumsum(1)
    targets = (sums - sums.gather(1, last)) % NUMBERS
    return Batch(torch.where(resets, RESET, numbers), targets, steps - last)


# ---- Associative recall -------------------------------------------------------------------------


def associative_recall(
    sequences: int, length: int, vocabulary: int, generator: torch.Generator
) -> Batch:
    """Random tokens; the target is the token that followed the last earlier one equal to this.

    Queries and targets come from one vocabulary, and every step is a query, as in the author's
    repository (GatedLinearRNN, data/associative_recall.py). Where the token has not come before
    there is no target (there: an unknown token). The span is the distance to the earlier one.
    """
    tokens = torch.randint(vocabulary, (sequences, length), generator=generator)
    rows = torch.arange(sequences)
    seen = torch.full((sequences, vocabulary), -1)  # the last step of each token
    targets = torch.full_like(tokens, IGNORED)
    spans = torch.zeros_like(tokens)
    for step in range(length):
        token = tokens[:, step]
        before = seen[rows, token]
        known = before >= 0
        targets[known, step] = tokens[rows[known], before[known] + 1]
        spans[known, step] = step - before[known]
        seen[rows, token] = step
    return Batch(tokens, targets, spans)


def _definition(function: Callable[..., Batch]) -> str:
    return (function.__doc__ or "").split("\n\n")[0]


TASKS = {
    task.name: task
    for task in (
        Task(
            "memory_horizon",
            _definition(memory_horizon) + " Length 256, a reset at one step of 48.",
            NUMBERS + 1,
            256,
            16,
            {"short": 300, "long": 3000},
            lambda sequences, generator: memory_horizon(sequences, 256, 1 / 48, generator),
            (0, 4, 8, 16, 32, 64, 128),
        ),
        Task(
            "associative_recall",
            _definition(associative_recall) + " Vocabulary 30, length 100.",
            30,
            100,
            32,
            {"short": 1000, "long": 10000},
            lambda sequences, generator: associative_recall(sequences, 100, 30, generator),
            (1, 4, 8, 16, 32, 64),  # of a span of 1 the target is the query
        ),
    )
}
