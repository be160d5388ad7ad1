"""The runs of ``gateloop train`` as they lie on the disk, finished or under way."""

import argparse
import contextlib
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from gateloop_cpp import _files, _pages, _spec

Read = TypeVar("Read")
METRICS = "metrics.jsonl"
EXPECTED = f"a run's directory ({_files.CONFIG}, {METRICS}) or a folder of such"
# Every record has it, last of its scalars: a tracker that has it has the record.
MARK = "train/bits_per_byte"
NAMES = {
    "train_bits_per_byte": MARK,
    "gradient_norm": "train/gradient_norm",
    "learning_rate": "train/learning_rate",
    "planned_steps": "train/planned_steps",
    "validation_bits_per_byte": "validation/bits_per_byte",
    "final_validation_bits_per_byte": "validation/final_bits_per_byte",
    "tokens_per_second": "speed/tokens_per_second",
    "elapsed_seconds": "speed/elapsed_seconds",
}
FINAL = "final_validation_bits_per_byte"
GONE_SECONDS = 10.0
MACHINE = ("program", "revision", "torch", "processor")


@dataclass
class Record:
    """One line of metrics.jsonl."""

    step: int
    elapsed_seconds: float
    scalars: dict[str, float]  # by the tracker's names, MARK last
    texts: dict[str, str]
    is_final: bool


@dataclass
class Log:
    """The records of a metrics.jsonl, also while a trainer writes it.

    A resumed run cuts its log back to the last checkpoint and repeats, bit for bit, the steps after
    it: those are not given again.
    """

    path: Path
    last_step: int = 0  # given so far
    is_finished: bool = False  # the last record, given or not, is a finished run's
    _file: tuple[int, int] = (0, 0)
    _offset: int = 0
    _lines: int = 0  # before the offset

    def new_records(self) -> list[Record]:
        """What whole lines have come since the last call; none while there is no file.

        Raises ValueError naming the file and the line that is no record.
        """
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if (status.st_dev, status.st_ino) != self._file or status.st_size < self._offset:
                    self._file, self._offset = (status.st_dev, status.st_ino), 0
                    self._lines = 0
                # Cut and grown again since the last call, it has no line that ends there.
                file.seek(max(0, self._offset - 1))
                if self._offset > 0 and file.read(1) != b"\n":
                    self._offset = self._lines = 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.split(b"\n")[:-1]
        records = [self._record(line, self._lines + i) for i, line in enumerate(lines, 1)]
        self._lines += len(lines)
        new = [record for record in records if record.step > self.last_step]
        self.last_step = max([self.last_step, *(record.step for record in new)])
        if records:
            self.is_finished = records[-1].is_final
        return new

    def _record(self, line: bytes, number: int) -> Record:
        try:
            return _parsed(line)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            shown = line[:80].decode("utf-8", "replace")
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(
                f"{self.path}: line {number}: not a record of a run: {reason}: {shown}"
            ) from error


def _parsed(line: bytes) -> Record:
    values: dict[str, Any] = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    step, elapsed = values.pop("step"), values.get("elapsed_seconds", 0)
    if type(step) is not int or not 1 <= step < 2**63:
        raise ValueError(f"step must be a whole number of 1 or more, got {step}")
    if not (type(elapsed) in (int, float) and math.isfinite(elapsed)):
        raise ValueError(f"elapsed_seconds must be a finite number, got {elapsed}")
    layers = _of_layers(values.pop("diagnostics", None))
    scalars: dict[str, float] = {}
    texts: dict[str, str] = {}
    for name, value in (values | layers).items():
        if isinstance(value, str):
            texts[name] = value
        elif isinstance(value, int | float) and math.isfinite(value):
            scalars[NAMES.get(name, name)] = value
    if MARK in scalars:
        scalars[MARK] = scalars.pop(MARK)
    return Record(step, elapsed, scalars, texts, FINAL in values)


def _of_layers(diagnostics: Any) -> dict[str, Any]:
    """By names such as layers/0/gradient_norm and, of lists, layers/0/half_life/q50."""
    if diagnostics is None:
        return {}
    suffixes = [f"q{round(100 * quantile):02}" for quantile in diagnostics["quantiles"]]
    found: dict[str, Any] = {}
    for index, layer in enumerate(diagnostics["layers"]):
        for name, value in layer.items():
            path = f"layers/{index}/{name}"
            if isinstance(value, list):
                named = zip(suffixes, value, strict=True)
                found |= {f"{path}/{suffix}": each for suffix, each in named}
            else:
                found[path] = value
    return found


@dataclass(frozen=True)
class Run:
    """What is shown of a run besides its records."""

    folder: Path
    id: str  # of the model and of when and how it was begun: a resumed run keeps it
    config: dict[str, Any]  # model, training, parameters
    machine: dict[str, Any]  # the program, its revision, torch and the processor, as it last ran
    began: float  # seconds since 1970

    @property
    def name(self) -> str:
        return _pages.as_text(self.folder.resolve().name)


def read_run(folder: Path) -> Run:
    """Raises FileNotFoundError or ValueError naming the file."""
    path = folder / _files.CONFIG
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config: dict[str, Any] = {key: dict(content[key]) for key in ("model", "training")}
        provenance = content.get("provenance", [])
        dates = [datetime.fromisoformat(entry["date"]).timestamp() for entry in provenance]
        began = provenance[0] if provenance else str(folder.resolve())
        start = hashlib.sha256(json.dumps(began).encode()).hexdigest()[:8]
        run_id = f"{content.get('id', 'run')}-{start}"
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: not the configuration of a run: {error}") from error
    with contextlib.suppress(ValueError):  # a model of another version
        config["parameters"] = sum(
            map(math.prod, _spec.describe(config["model"])["weights"].values())
        )
    latest = provenance[-1] if provenance else {}
    machine = {key: latest[key] for key in MACHINE if key in latest}
    return Run(folder, run_id, config, machine, dates[0] if dates else path.stat().st_mtime)


@dataclass
class Source:
    """A run's directory while a trainer writes it; another run may begin in it (--overwrite)."""

    run: Run
    log: Log
    gone_since: float | None = None  # by the monotonic clock; None: it is there
    _config: tuple[int, ...] = ()

    def new_records(self) -> list[Record]:
        """What has come since the last call.

        Where run.id is another one after it: all of the run that has begun there. Raises OSError or
        ValueError naming the file.
        """
        records = self.log.new_records()
        # A trainer writes config.json before the first line, and removes the old log before that.
        try:
            config = _stamp(self.run.folder / _files.CONFIG)
            if config != self._config:
                found = read_run(self.run.folder)
                self._config = config
                if found.id != self.run.id:
                    self.log = Log(self.log.path)
                    records = self.log.new_records()
                self.run = found
            self.log.path.stat()
        except FileNotFoundError:
            self.gone_since = self.gone_since or time.monotonic()
        else:
            self.gone_since = None
        return records

    @property
    def is_gone(self) -> bool:
        """For longer than a run takes to begin anew."""
        return self.gone_since is not None and time.monotonic() > self.gone_since + GONE_SECONDS


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def source(folder: Path) -> Source:
    """Raises FileNotFoundError or ValueError naming the file."""
    config = _stamp(folder / _files.CONFIG)
    return Source(read_run(folder), Log(folder / METRICS), _config=config)


def run_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Of a command of ``gateloop`` that reads runs."""
    parser = argparse.ArgumentParser(
        prog=f"gateloop {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help=EXPECTED)
    return parser


def is_run(folder: Path) -> bool:
    return (folder / _files.CONFIG).is_file() and (folder / METRICS).is_file()


def find_runs(folders: Iterable[Path]) -> dict[Path, bool]:
    """Each folder that is a run, and the runs in each that is none; whether it is named itself.

    Raises FileNotFoundError or ValueError naming a folder without any.
    """
    found: dict[Path, bool] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder; expected {EXPECTED}")
        named = is_run(folder)
        runs = [folder] if named else sorted(filter(is_run, folder.iterdir()))
        if not runs:
            raise ValueError(f"{folder}: no run in it; expected {EXPECTED}")
        for run in runs:
            found[run] = found.get(run, False) or named
    return found


def readable(
    folders: Iterable[Path], read: Callable[[Path], Read], program: str
) -> tuple[list[Read], list[str]]:
    """What is read of each run that is found, and why others of a folder of runs are left out.

    The latter goes to stderr too, after the program's name. Raises OSError or ValueError naming a
    folder without runs, what cannot be read of a run that is named itself, and all where nothing
    can be read.
    """
    found: list[Read] = []
    problems: list[str] = []
    for run, named in find_runs(folders).items():
        try:
            found.append(read(run))
        except (OSError, ValueError) as error:
            if named:
                raise
            problems.append(str(error))
    if not found:
        raise ValueError("; ".join(problems))
    for problem in problems:
        print(f"{program}: left out: {problem}", file=sys.stderr)
    return found, problems
