"""Runs of ``gateloop train`` on a text, read back from their directories."""

import bz2
import dataclasses
import gzip
import hashlib
import json
import lzma
import re
import statistics
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.flags import merged
from experiments.frame import BITS_PER_BYTE, Settings
from experiments.records import Cell, Form, Outcome
from gateloop_cpp import _files, _histories, _runs

# By their first bytes; `gateloop train` reads more kinds.
UNPACK: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"\xfd7zXZ": lzma.open,
    b"BZh": bz2.open,
}


class Split(NamedTuple):
    """Of a text, from its start."""

    sizes: str  # bytes to train, validate and test on
    crc: int  # CRC-32 of all these bytes

    def check(self, text: str, file: Path) -> None:
        """Raises ValueError where the file holds another text."""
        size = sum(map(int, self.sizes.split(",")))
        came = _head(file, size)
        if len(came) < size or zlib.crc32(came) != self.crc:
            raise ValueError(
                f"{file}: expected {text}, plain or packed by gzip, xz or bzip2: {size} bytes or"
                f" more, the first {size} of crc {self.crc:08x};"
                f" got {len(came)} of crc {zlib.crc32(came):08x}"
            )


def _head(file: Path, size: int) -> bytes:
    with file.open("rb") as content:
        start = content.read(8)
    opened = next((o for magic, o in UNPACK.items() if start.startswith(magic)), open)
    try:
        with opened(file, "rb") as content:
            head: bytes = content.read(size)
    except (EOFError, lzma.LZMAError) as error:
        raise ValueError(f"{file}: cannot be unpacked: {error}") from error
    return head


SPLITS = {
    "enwik8": Split("3600000,200000,200000", 0x57464084),
    "tinyshakespeare": Split("1000000,57000,58000", 0xCCA6D1F8),
}
# Of test text, in windows of these lengths.
WINDOWS = (256, 1024, 4096)
BYTES_TESTED = {"short": 32768, "long": 200000}
STEPS: dict[Form, int] = {"short": 300, "long": 3000}
WINDOWS_VALIDATED = {"short": 256, "long": 4096}
STATE = "training_state.safetensors"
UNSEEN = ["--validation-windows", "1", "--final-windows", "1", "--sample-length", "0"]
TINY = ["--steps", "1", "--batch", "1", "--length", "16", *UNSEEN]
PACE_STEPS = 60
NUMBER = re.compile(r"([0-9.]+) bits per byte, (\d+) bytes predicted")


class Language:
    """A byte-level language model on one of the texts; results in bits per byte."""

    def __init__(self, settings: Settings, windows: Sequence[int] = ()) -> None:
        if settings.text not in SPLITS:
            raise ValueError(f"--text: expected {' or '.join(SPLITS)}, got {settings.text}")
        if not settings.data.is_file():
            raise FileNotFoundError(
                f"{settings.data}: no such text: 'make corpus', or --data FILE (make: DATA=FILE)"
            )
        SPLITS[settings.text].check(settings.text, settings.data)
        self.settings = settings
        self.text = settings.text
        self.windows = windows

    def parameters(self, flags: Sequence[str]) -> int:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            self._train(run, merged([*flags, *TINY]), "0")
            return int(_runs.read_run(run).config["parameters"])

    def steps(self, form: Form) -> int:
        return STEPS[form]

    def pace(self, flags: Sequence[str], form: Form) -> float:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            steps = ["--steps", str(PACE_STEPS), *UNSEEN]
            self._train(run, [*flags, *steps], str(self.settings.threads))
            history = _histories.read(run)
            speeds = [v for r, v in history.values(_histories.SPEED) if r.step > PACE_STEPS // 3]
            return history.bytes_per_step / statistics.median(speeds)

    def run(self, cell: Cell, steps: int) -> Outcome:
        folder = self._folder(cell)
        if not self._is_finished(folder, steps):
            if self._is_under_way(folder, steps):
                self._gateloop("train", "--resume", "--out", folder, "--data", self.settings.data)
            else:
                windows = str(WINDOWS_VALIDATED[cell.form])
                flags = ["--steps", str(steps), "--warmup-steps", str(max(1, steps // 6))]
                flags += ["--learning-rate", f"{cell.learning_rate:g}", "--seed", str(cell.seed)]
                flags += ["--final-windows", windows, "--sample-length", "0", "--overwrite"]
                self._train(folder, [*flags, *cell.flags], str(self.settings.threads))
        history = _histories.read(folder)
        last, config = history.last, history.run.config
        assert history.final is not None
        return Outcome(
            parameters=config["parameters"],
            steps=last.step,
            seconds=round(last.elapsed_seconds, 2),
            bytes=last.step * history.bytes_per_step,
            results={BITS_PER_BYTE.name: round(history.final, 5)},
            fingerprint=config["training"]["fingerprint"],
            revision=str(history.run.machine["revision"]),
        )

    def finish(self, cell: Cell, outcome: Outcome) -> Outcome:
        wanted = {f"test_{window}": window for window in self.windows}
        missing = {name: wanted[name] for name in wanted if name not in outcome.results}
        folder = self._folder(cell)
        if missing and not self._is_finished(
            folder, outcome.steps
        ):  # its weights are gone: the same again
            self.run(cell, outcome.steps)
        found = {
            name: self._test(folder, window, BYTES_TESTED[cell.form])
            for name, window in missing.items()
        }
        return dataclasses.replace(outcome, results=outcome.results | found)

    def remove(self, cell: Cell) -> None:
        """metrics.jsonl and config.json stay."""
        for weights in self._folder(cell).glob("*.safetensors"):
            weights.unlink()

    def _test(self, folder: Path, window: int, count: int) -> float:
        said = self._gateloop(
            *("evaluate", "--checkpoint", folder, "--data", self.settings.data),
            *("--split", SPLITS[self.text].sizes, "--part", "test", "--first", count),
            *("--mode", "windowed", "--length", window, "--threads", self.settings.threads),
        )
        found = NUMBER.search(said)
        if found is None:
            raise RuntimeError(f"gateloop evaluate: expected bits per byte, got {said[-200:]}")
        return float(found[1])

    def _folder(self, cell: Cell) -> Path:
        """Other flags have another folder."""
        content = json.dumps([cell.flags, cell.form, cell.budget, cell.text])
        mark = hashlib.sha256(content.encode()).hexdigest()[:8]
        name = f"{cell.variant}-{cell.learning_rate:g}-{cell.seed}-{mark}"
        return self.settings.runs / cell.experiment / name

    @staticmethod
    def _is_finished(folder: Path, steps: int) -> bool:
        if not (_runs.is_run(folder) and (folder / _files.WEIGHTS["latest"]).exists()):
            return False
        history = _histories.read(folder)
        if not history.records or history.final is None:
            return False
        return history.last.step == steps

    @staticmethod
    def _is_under_way(folder: Path, steps: int) -> bool:
        if not (_runs.is_run(folder) and (folder / STATE).exists()):
            return False
        return _histories.read(folder).planned_steps == steps

    def _train(self, folder: Path, flags: Sequence[str], threads: str) -> None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._gateloop(
            *("train", "--data", self.settings.data, "--split", SPLITS[self.text].sizes),
            *("--out", folder, "--threads", threads, *flags),
        )

    def _gateloop(self, *arguments: object) -> str:
        command = [str(self.settings.program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        if done.returncode != 0:
            raise RuntimeError(
                f"{' '.join(command)}: exit code {done.returncode}:"
                f" {done.stderr[-500:] or done.stdout[-500:]}"
            )
        return done.stdout
