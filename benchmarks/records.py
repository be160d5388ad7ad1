"""What was measured, as it is kept in benchmarks/results/*.json."""

import json
import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.contenders import Kind


@dataclass
class Row:
    """One contender in one pass of one problem."""

    group: str
    problem: str
    which: str
    contender: str
    kind: Kind
    unit: str
    work: int
    tolerance: float
    error: float | None = None  # a floor has none
    values: list[float] = field(default_factory=list)  # seconds of each round, or bytes
    absent: str | None = None  # why it took no part
    failed: str | None = None  # what went wrong

    @property
    def value(self) -> float:
        return statistics.median(self.values) if self.values else math.nan

    @property
    def wrong(self) -> bool:
        # Written so that NaN is wrong.
        return self.error is not None and not self.error <= self.tolerance


@dataclass
class Record:
    environment: dict[str, str]
    rows: list[Row]


def file_of(group: str, folder: Path) -> Path:
    return folder / f"{group.replace(' ', '_')}.json"


def save(record: Record, folder: Path) -> None:
    """One file a group; a new measurement replaces those of its groups alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for group in dict.fromkeys(row.group for row in record.rows):
        rows = [asdict(row) for row in record.rows if row.group == group]
        content = {"environment": record.environment, "rows": rows}
        file_of(group, folder).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(file: Path) -> Record:
    content = json.loads(file.read_text(encoding="utf-8"))
    return Record(content["environment"], [Row(**row) for row in content["rows"]])
