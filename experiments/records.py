"""What was run, as it is kept in experiments/results/NAME.json: a record for every run."""

import fcntl
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"

Form = Literal["short", "long"]
Budget = Literal["steps", "time"]


@dataclass(frozen=True)
class Cell:
    """What a run is asked for. A record that answers it is not made again."""

    experiment: str
    variant: str
    flags: tuple[str, ...]  # of gateloop train, or of a task of experiments/
    form: Form
    budget: Budget
    text: str  # the text, or the task, that is learned
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What a run gave."""

    parameters: int
    steps: int
    seconds: float
    bytes: int  # or tokens of a task, seen in training
    results: dict[str, float]
    fingerprint: str  # of the text, or the definition of the task
    revision: str  # of the program or library that ran


@dataclass(frozen=True)
class Record:
    cell: Cell
    outcome: Outcome
    machine: dict[str, Any]  # processor, cores, threads of the run, load at its end
    date: str  # of its end, UTC

    def problems(self) -> list[str]:
        """What a record must name and does not."""
        named = asdict(self.outcome) | {"date": self.date} | self.machine
        needed = ("parameters", "steps", "seconds", "bytes", "results", "fingerprint", "revision")
        machine = ("processor", "cores", "threads", "load")
        missing = [name for name in (*needed, "date", *machine) if named.get(name) in (None, "", 0)]
        return [name for name in missing if name != "load" or "load" not in named]


def from_json(content: dict[str, Any]) -> Record:
    cell = content["cell"] | {"flags": tuple(content["cell"]["flags"])}
    return Record(Cell(**cell), Outcome(**content["outcome"]), content["machine"], content["date"])


def load(file: Path) -> list[Record]:
    """Empty where there is no file. Raises ValueError naming the file that holds no records."""
    if not file.exists():
        return []
    try:
        return [from_json(each) for each in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file}: not records of experiments: {error}") from error


def save(file: Path, records: Sequence[Record]) -> None:
    """In one step: an interrupted save leaves the file as it was."""
    ordered = sorted(records, key=lambda r: (r.cell.form, r.cell.budget, r.cell.text, r.date))
    lines = ",\n".join(json.dumps(asdict(each), ensure_ascii=False) for each in ordered)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    part.replace(file)


def change(file: Path, changed: Callable[[list[Record]], list[Record]]) -> None:
    """Saves ``changed(records)``; no other thread or process changes the file meanwhile.

    The lock is that of NAME.lock beside it, which stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        save(file, changed(load(file)))
