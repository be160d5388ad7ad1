"""How an experiment is run: variants, learning rates and seeds, until every record is there.

The learning rate of a variant is chosen from the experiment's grid by the validation of the first
seed; the other seeds run at the chosen one. A stopped experiment goes on where it stopped.
"""

import dataclasses
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from benchmarks import environment

from experiments import records
from experiments.flags import merged
from experiments.records import Budget, Cell, Form, Outcome, Record

# Widths are whole numbers: counts of parameters agree within this share of the experiment's.
TOLERANCE = 0.02


@dataclass(frozen=True)
class Variant:
    name: str
    flags: str  # what differs from the experiment's own flags
    title: str
    unused: int = 0  # parameters that take part in nothing with these flags


@dataclass(frozen=True)
class Measure:
    """The result that chooses the learning rate."""

    name: str
    best: Callable[..., Record]  # min or max


BITS_PER_BYTE = Measure("bits_per_byte", min)  # of validation text
ACCURACY = Measure("accuracy", max)


class Trainer(Protocol):
    """What runs a cell: of ``gateloop train``, or of a synthetic task."""

    text: str

    def parameters(self, flags: Sequence[str]) -> int: ...

    def steps(self, form: Form) -> int: ...

    def pace(self, flags: Sequence[str], form: Form) -> float:
        """Seconds of a step, measured."""
        ...

    def run(self, cell: Cell, steps: int) -> Outcome: ...

    def finish(self, cell: Cell, outcome: Outcome) -> Outcome:
        """With what is measured at the chosen learning rate alone."""
        ...

    def remove(self, cell: Cell) -> None:
        """Removes what a later run of the cell would take for its own or go on from."""
        ...


@dataclass(frozen=True)
class Experiment:
    name: str
    document: str  # question, method, command
    variants: tuple[Variant, ...]  # with equal time all get the time of the first
    flags: str  # of all variants
    parameters: int
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    trainer: Callable[["Settings"], Trainer]
    measure: Measure = BITS_PER_BYTE

    def chosen_flags(self, variant: Variant) -> tuple[str, ...]:
        return merged((*self.flags.split(), *variant.flags.split()))


@dataclass(frozen=True)
class Settings:
    """What a user of ``python -m experiments`` may set."""

    form: Form
    budget: Budget
    text: str
    data: Path
    program: Path
    runs: Path
    threads: int
    jobs: int


class Session:
    """One experiment under way, and its file of records."""

    def __init__(
        self,
        experiment: Experiment,
        settings: Settings,
        file: Path,
        say: Callable[[str], None] = print,
    ) -> None:
        self.experiment = experiment
        self.settings = settings
        self.file = file
        self.trainer = experiment.trainer(settings)
        self.say = say
        self._stopped = threading.Event()  # one variant failed, or the user stopped all

    def cell(self, variant: Variant, learning_rate: float, seed: int) -> Cell:
        flags = self.experiment.chosen_flags(variant)
        form, budget = self.settings.form, self.settings.budget
        name, text = self.experiment.name, self.trainer.text
        return Cell(name, variant.name, flags, form, budget, text, learning_rate, seed)

    def run(self, only: Sequence[str] = ()) -> None:
        """Every record that is missing, of all variants or of some.

        Raises ValueError for no variant of ours and where parameters are not equal, RuntimeError
        where a run fails: the runs under way end, no other begins.
        """
        self._stopped.clear()
        chosen = self._named(only)
        self._check_parameters(chosen)
        steps = self._steps(chosen)
        with ThreadPoolExecutor(self.settings.jobs) as pool:
            pending = [
                pool.submit(self._complete, variant, steps[variant.name]) for variant in chosen
            ]
            try:
                for each in as_completed(pending):
                    each.result()
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def remove(self, only: Sequence[str] = ()) -> None:
        """Records and runs of this form, budget and text, of all variants or of some."""
        variants = self._named(only)
        names = [variant.name for variant in variants]
        mine = (self.settings.form, self.settings.budget, self.trainer.text)

        def named(cell: Cell) -> bool:
            return cell.variant in names and (cell.form, cell.budget, cell.text) == mine

        for variant in variants:
            self._remove_runs(variant)
        records.change(self.file, lambda found: [r for r in found if not named(r.cell)])

    def _remove_runs(self, variant: Variant) -> None:
        for rate in self.experiment.learning_rates:
            for seed in self.experiment.seeds:
                self.trainer.remove(self.cell(variant, rate, seed))

    def _named(self, only: Sequence[str]) -> list[Variant]:
        names = [variant.name for variant in self.experiment.variants]
        for name in only:
            if name not in names:
                raise ValueError(f"no variant {name}: expected one of {', '.join(names)}")
        return [v for v in self.experiment.variants if not only or v.name in only]

    def _check_parameters(self, variants: Sequence[Variant]) -> None:
        target = self.experiment.parameters
        for variant in variants:
            found = self.trainer.parameters(self.experiment.chosen_flags(variant))
            found -= variant.unused
            if abs(found - target) > TOLERANCE * target:
                raise ValueError(
                    f"{self.experiment.name}, {variant.name}: expected {target:,} parameters within"
                    f" {TOLERANCE:.0%}, got {found:,}: adjust its widths"
                )

    def _steps(self, variants: Sequence[Variant]) -> dict[str, int]:
        """With equal time those that the first variant's time allows, or of the records."""
        whole = self.trainer.steps(self.settings.form)
        if self.settings.budget == "steps":
            return {v.name: whole for v in variants}
        first = self.experiment.variants[0]
        steps = {first.name: whole} | self._recorded_steps()
        missing = [v for v in variants if v.name not in steps]
        if missing:
            time = steps[first.name] * self._pace(first)
            for variant in missing:  # one at a time, alone on the machine
                steps[variant.name] = max(1, round(time / self._pace(variant)))
        return steps

    def _recorded_steps(self) -> dict[str, int]:
        """By variant: of records of this form, budget and text, with the flags as they are."""
        cells = {v.name: self.cell(v, 0.0, 0) for v in self.experiment.variants}
        return {
            r.cell.variant: r.outcome.steps
            for r in records.load(self.file)
            if dataclasses.replace(r.cell, learning_rate=0.0, seed=0) == cells.get(r.cell.variant)
        }

    def _pace(self, variant: Variant) -> float:
        flags = self.experiment.chosen_flags(variant)
        pace = self.trainer.pace(flags, self.settings.form)
        self.say(f"{variant.name}: {pace:.4f} s a step")
        return pace

    def _complete(self, variant: Variant, steps: int) -> None:
        first, *others = self.experiment.seeds
        tried = [
            self._record(self.cell(variant, rate, first), steps)
            for rate in self.experiment.learning_rates
        ]
        best = chosen_rate(tried, self.experiment.measure)
        for seed in (first, *others):
            record = self._record(self.cell(variant, best, seed), steps)
            self._check_stopped()
            finished = self.trainer.finish(record.cell, record.outcome)
            if finished != record.outcome:
                self._keep(dataclasses.replace(record, outcome=finished))
        self._remove_runs(variant)

    def _record(self, cell: Cell, steps: int) -> Record:
        known = [r for r in records.load(self.file) if r.cell == cell]
        if known:
            return known[0]
        self._check_stopped()
        outcome = self.trainer.run(cell, steps)
        machine = {
            "processor": environment.processor(),
            "cores": environment.cores(),
            "threads": self.settings.threads,
            "load": round(os.getloadavg()[0], 2),
        }
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        record = Record(cell, outcome, machine, date)
        self._keep(record)
        score = outcome.results[self.experiment.measure.name]
        where = f"{cell.variant}, learning rate {cell.learning_rate:g}, seed {cell.seed}"
        self.say(f"{where}: {score:.4f} in {outcome.seconds:.0f} s")
        return record

    def _check_stopped(self) -> None:
        if self._stopped.is_set():
            raise CancelledError

    def _keep(self, record: Record) -> None:
        """In place of the record of the same cell, or of the same with other flags."""

        def place(cell: Cell) -> Cell:
            return dataclasses.replace(cell, flags=())

        def changed(found: list[Record]) -> list[Record]:
            return [*(r for r in found if place(r.cell) != place(record.cell)), record]

        records.change(self.file, changed)


def chosen_rate(tried: Sequence[Record], measure: Measure) -> float:
    """The learning rate of the best record; of equal ones the first."""
    best = measure.best(tried, key=lambda record: record.outcome.results[measure.name])
    return best.cell.learning_rate


@dataclass(frozen=True)
class Answer:
    """A variant's records at its learning rate."""

    variant: Variant
    learning_rate: float
    at_edge: bool  # a rate beyond the grid may be better
    records: tuple[Record, ...]  # one a seed, of those that have run

    def values(self, name: str) -> list[float]:
        return [r.outcome.results[name] for r in self.records if name in r.outcome.results]


def answers(experiment: Experiment, found: Sequence[Record]) -> list[Answer]:
    """Of the variants whose learning rate is chosen, from records of one form, budget and text."""
    result = []
    rates, seeds = experiment.learning_rates, experiment.seeds
    for variant in experiment.variants:
        flags = experiment.chosen_flags(variant)
        runs = {
            (r.cell.learning_rate, r.cell.seed): r
            for r in found
            if (r.cell.variant, r.cell.flags) == (variant.name, flags)
        }
        tried = [runs[rate, seeds[0]] for rate in rates if (rate, seeds[0]) in runs]
        if len(tried) == len(rates):
            rate = chosen_rate(tried, experiment.measure)
            edge = len(rates) > 1 and rate in (rates[0], rates[-1])
            chosen = tuple(runs[rate, seed] for seed in seeds if (rate, seed) in runs)
            result.append(Answer(variant, rate, edge, chosen))
    return result
