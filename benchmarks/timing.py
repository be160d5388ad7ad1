"""How time is taken: in turns, so that a busy moment of the machine falls on everyone."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def seconds_of(run: Callable[[], object], at_least: float) -> float:
    """Seconds of one call. A call shorter than ten times `at_least` is repeated until `at_least`
    has passed; the first finds cold caches, a sleeping thread pool and memory that the system may
    have to fetch from the host of a virtual machine, and is left out of the median."""
    taken: list[float] = []
    while not taken or (taken[0] < 10 * at_least and sum(taken[1:]) < at_least):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:] or taken)


def interleave(
    contenders: Mapping[Key, Callable[[], Value]], rounds: int, budget: float
) -> dict[Key, list[Value]]:
    """Measures everyone once a round; no new round begins after `budget` seconds and two rounds."""
    values: dict[Key, list[Value]] = {name: [] for name in contenders}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 2 and time.perf_counter() - start > budget:
            break
        for name, measure in contenders.items():
            values[name].append(measure())
    return values
