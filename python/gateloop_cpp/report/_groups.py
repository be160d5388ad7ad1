"""Runs in groups that differ by their seed alone, and by what options others differ."""

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateloop_cpp._histories import History, make_names_distinct

# Options of training that change no number beyond rounding, or are in History.length.
NO_DIFFERENCE = {
    *("seed", "preset", "data", "threads", "device", "rows_per_pass", "shard_optimizer"),
    *("sample_every", "sample_prime", "sample_length", "checkpoint_every", "diagnostics_every"),
    *("steps", "minutes", "plan"),
}


@dataclass
class Group:
    """Runs that differ by their seed alone."""

    name: str
    histories: list[History]

    def over_seeds(self, value: Callable[[History], float | None]) -> tuple[float, float] | None:
        """Mean and sample standard deviation; None unless two runs or more have the value."""
        values = [v for history in self.histories if (v := value(history)) is not None]
        if len(values) < 2:
            return None
        return statistics.mean(values), statistics.stdev(values)


def groups(histories: Sequence[History]) -> list[Group]:
    """The best first; those without a validation last."""
    make_names_distinct(histories)
    found: dict[str, list[History]] = {}
    for history in histories:
        found.setdefault(_key(history), []).append(history)
    result: list[Group] = []
    for members in found.values():
        members.sort(key=lambda history: history.seed)
        result.append(Group(_group_name(members, {group.name for group in result}), members))
    return sorted(result, key=_rank)


def _rank(group: Group) -> float:
    scores = [h.final if h.final is not None else _best_or_last(h) for h in group.histories]
    return statistics.mean(scores)


def _best_or_last(history: History) -> float:
    return history.best.bits_per_byte if history.best else math.inf


def _key(history: History) -> str:
    training = {k: v for k, v in history.training.items() if k not in NO_DIFFERENCE}
    return json.dumps([history.run.config["model"], training, history.length], sort_keys=True)


def _group_name(members: Sequence[History], taken: set[str]) -> str:
    if len(members) == 1:
        return members[0].name
    # "small-seed0" and "small-seed1" are "small".
    letters = zip(*(history.name for history in members), strict=False)
    same = itertools.takewhile(lambda each: len(set(each)) == 1, letters)
    common = re.sub(r"[-_. ]+((seed|s)[-_.=]*\d*)?$", "", "".join(each[0] for each in same))
    if not common or common in taken:
        return f"{members[0].name} and {len(members) - 1} more"
    return common


def flat_options(history: History) -> dict[str, str]:
    """Every option as JSON, and the machine; without the plan, which may be long."""
    config = history.run.config
    options = dict(config["model"])
    options |= {key: value for key, value in history.training.items() if key != "plan"}
    options |= history.run.machine
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in options.items()
    }


def differing_options(histories: Sequence[History]) -> list[str]:
    """Names of those that two of the runs have otherwise, in their order."""
    options = [flat_options(history) for history in histories]
    names = dict.fromkeys(name for each in options for name in each)
    return [name for name in names if len({each.get(name) for each in options}) > 1]
