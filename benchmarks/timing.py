"""How time is taken: in turns, so that a busy moment of the machine falls on everyone."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


def seconds_of(run: Callable[[], object], at_least: float) -> float:
    """Seconds of one call, the fastest of three after calls of five times `at_least` that do not
    count; all three take `at_least` together. Longer than ten times `at_least`, one call is timed,
    and longer than a hundred times, no other is made.

    For what disturbs a call only adds to it: cold caches, a sleeping thread pool, and the host of a
    virtual machine, to which idle memory goes back; four or more calls after a pause then took ten
    times as long.
    """

    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    untimed = first = seconds()
    if first >= 100 * at_least:
        return first
    fewest = 3 if first < 10 * at_least else 1
    while untimed < 5 * at_least:
        untimed += seconds()
    timed: list[float] = []
    while len(timed) < fewest or sum(timed) < at_least:
        timed.append(seconds())
    return min(timed)


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
