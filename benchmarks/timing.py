"""How time is taken: in turns, so that a busy moment of the machine falls on everyone."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def seconds_of(run: Callable[[], object], at_least: float) -> float:
    """Seconds of one call. A call shorter than ten times `at_least` is repeated: for five times
    `at_least` untimed, then until `at_least` has passed, of which the median counts. For the first
    calls after a pause find cold caches and a sleeping thread pool, and a virtual machine gives
    idle memory back to its host: up to four calls then took ten times as long."""

    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def calls(total: float) -> list[float]:
        taken: list[float] = []
        while sum(taken) < total:
            taken.append(seconds())
        return taken

    first = seconds()
    if first >= 10 * at_least:
        return first
    calls(5 * at_least - first)
    return statistics.median(calls(at_least))


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
