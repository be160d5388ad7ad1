"""Whole runs of ``gateloop train``, and what plots and reports show of them."""

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateloop_cpp import _runs
from gateloop_cpp._files import CONFIG
from gateloop_cpp._runs import Log, Record, Run, Source

VALIDATION = "validation/bits_per_byte"
FINAL = _runs.NAMES[_runs.FINAL]
SPEED = "speed/tokens_per_second"
PLANNED = "train/planned_steps"
# Steps that a mean spans: single batches jump by 0.2 bits.
LEAST_MEMORY = 20
MEMORY_SHARE = 1 / 50  # of the run so far
# The limits of a plot of losses are those after a first share of the longest run, in which losses
# fall most, and up to so many times their median, above which runs diverge.
FIRST_SHARE = 0.05
FAR = 2.0

Point = tuple[Record, float]


@dataclass(frozen=True)
class Score:
    step: int
    bits_per_byte: float


@dataclass
class Series:
    """The values of one name, and their means; grows with the records, each read once."""

    points: list[Point] = field(default_factory=list)
    means: list[Point] = field(default_factory=list)
    _read: int = 0

    def advance(self, name: str, records: Sequence[Record], scale: float) -> None:
        for record in itertools.islice(records, self._read, None):
            if name in record.scalars:
                self.points.append((record, scale * record.scalars[name]))
        self._read = len(records)

    def smooth(self) -> None:
        """Exponential means; at first of all values so far, so that they begin at the first."""
        mean = self.means[-1][1] if self.means else 0.0
        for record, value in itertools.islice(self.points, len(self.means), None):
            count = len(self.means) + 1
            mean += (value - mean) / max(min(count, LEAST_MEMORY), MEMORY_SHARE * count)
            self.means.append((record, mean))


@dataclass
class History:
    """A run and all its records; without any where no step is made yet."""

    source: Source
    name: str
    records: list[Record] = field(default_factory=list)
    problem: str = ""  # why it is no longer read
    _series: dict[str, Series] = field(default_factory=dict)

    @property
    def run(self) -> Run:
        return self.source.run

    @property
    def log(self) -> Log:
        return self.source.log

    def advance(self) -> None:
        """Reads the records that have come; of a run begun anew all, and none of the former.

        Raises OSError or ValueError naming the file.
        """
        before = self.run.id
        records = self.source.new_records()
        if self.run.id != before:
            self.records, self._series = [], {}
            _check_numbers(self)
        self.records += records

    @property
    def last(self) -> Record:
        """IndexError where there is none."""
        return self.records[-1]

    @property
    def training(self) -> dict[str, Any]:
        return self.run.config["training"]

    @property
    def bytes_per_token(self) -> float:
        """Where the model reads tokens, their mean; else 1."""
        return float(self.training.get("bytes_per_token", 1))

    @property
    def bytes_per_step(self) -> int:
        tokens = math.prod(int(self.training[key]) for key in ("batch", "accumulation", "length"))
        return round(tokens * self.bytes_per_token)

    @property
    def seed(self) -> int:
        return int(self.training.get("seed") or 0)

    @property
    def planned_steps(self) -> int | None:
        """Where the length follows from a time or an earlier run's plan, the latest estimate."""
        if self.training.get("steps"):
            return int(self.training["steps"])
        estimates = self.values(PLANNED)
        return int(estimates[-1][1]) if estimates else self.plans_last_total

    @property
    def plans_last_total(self) -> int | None:
        plan = self.training.get("plan")
        return int(plan[-1][1]) if plan else None

    @property
    def length(self) -> tuple[str, float | None]:
        """How it is given: in steps, else in minutes, else by an earlier run's plan."""
        for name in ("steps", "minutes"):
            if self.training.get(name):
                return name, float(self.training[name])
        return "plan", self.plans_last_total

    def values(self, name: str) -> list[Point]:
        """The speed is in bytes. Not a copy."""
        series = self._series.setdefault(name, Series())
        series.advance(name, self.records, self.bytes_per_token if name == SPEED else 1)
        return series.points

    def smoothed(self, name: str) -> list[Point]:
        """Means of these values. Not a copy."""
        self.values(name)
        series = self._series[name]
        series.smooth()
        return series.means

    @property
    def final(self) -> float | None:
        """Of a finished run. A run may have gone on after an earlier end."""
        return self.last.scalars.get(FINAL)

    @property
    def best(self) -> Score | None:
        scores = [Score(record.step, value) for record, value in self.values(VALIDATION)]
        return min(scores, key=lambda score: score.bits_per_byte, default=None)

    @property
    def bytes_per_second(self) -> float | None:
        """The median over steps: the pause of one step does not count."""
        speeds = [value for _, value in self.values(SPEED)]
        return statistics.median(speeds) if speeds else None


def read(folder: Path) -> History:
    """Raises OSError or ValueError naming the file."""
    source = _runs.source(folder)
    history = History(source, source.run.name)
    _check_numbers(history)
    history.advance()
    return history


def _check_numbers(history: History) -> None:
    try:
        _ = history.bytes_per_step, history.planned_steps, history.seed, history.length
    except (KeyError, IndexError, TypeError, ValueError) as error:
        options = "batch, accumulation, length, steps, minutes, plan and seed"
        path = history.run.folder / CONFIG
        raise ValueError(f"{path}: no numbers for {options}: {error}") from error


def make_names_distinct(histories: Sequence[History]) -> None:
    """Where two folders have the same name, their paths are the names."""
    names = [history.run.name for history in histories]
    for history in histories:
        if names.count(history.run.name) > 1:
            history.name = str(history.run.folder)


def usual(lines: Sequence[Sequence[float]]) -> list[float]:
    """All values up to FAR times the median of the lines' medians."""
    medians = [statistics.median_low(line) for line in lines if line]
    most = FAR * statistics.median_low(medians) if medians else 0.0
    return [value for line in lines for value in line if value <= most]


@dataclass(frozen=True)
class Axis:
    name: str
    label: str
    title: str
    value: Callable[[History, Record], float]


def axes(histories: Sequence[History]) -> list[Axis]:
    longest = max(history.last.elapsed_seconds for history in histories)
    unit, seconds = next(
        (unit for unit in (("hours", 3600.0), ("minutes", 60.0)) if longest >= 2 * unit[1]),
        ("seconds", 1.0),
    )
    return [
        Axis("step", "steps", "steps", lambda _, record: record.step),
        Axis("bytes", "bytes", "bytes seen", lambda h, record: record.step * h.bytes_per_step),
        Axis("time", "time", f"{unit} of training", lambda _, r: r.elapsed_seconds / seconds),
    ]


def si(value: float) -> str:
    """Three digits: 26.6k."""
    exponent = min(4, max(0, math.floor(math.log10(value) / 3))) if value > 0 else 0
    return f"{value / 1000**exponent:.3g}{['', 'k', 'M', 'G', 'T'][exponent]}"


def clock(seconds: float) -> str:
    """In whole seconds: 1:02:03."""
    total = round(seconds)
    hours, minutes, rest = total // 3600, total // 60 % 60, total % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
