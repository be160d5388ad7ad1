"""The gateloop program as a contender, timed by its own log."""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.contenders import AbsentError
from benchmarks.environment import cores

REFUSED = 2  # the program's exit status for a command line that does not fit


def launcher(processes: int) -> list[str]:
    """The words before the program that start so many of it, which share the cores."""
    if processes == 1:
        return []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python"]
    threads = max(1, cores() // processes)
    return ["env", f"OMP_NUM_THREADS={threads}", *torchrun, "--nproc-per-node", str(processes)]


def run(*arguments: str | Path, processes: int = 1) -> tuple[bytes, str]:
    """What the program writes to standard output and standard error."""
    program = os.environ.get("GATELOOP_PROGRAM")
    if not program or not Path(program).exists():
        raise AbsentError("the gateloop program is not built")
    command = [*launcher(processes), program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True)
    if done.returncode == REFUSED:  # an older revision, which lacks the command or a flag
        reason = done.stderr.decode().strip().splitlines()[-1]
        raise AbsentError(f"this revision refuses the command: {reason}")
    if done.returncode != 0:
        raise RuntimeError(f"gateloop {arguments[0]} failed: {done.stderr.decode()[-500:]}")
    return done.stdout, done.stderr.decode()


def train(
    text: bytes, flags: list[str], steps: int, folder: Path, processes: int = 1
) -> list[dict[str, float]]:
    """Trains into `folder`/run and returns what it notes of each step."""
    if processes > 1 and "--backend" not in run("train", "--help")[0].decode():
        raise AbsentError("this revision trains in one process")
    data = folder / "text"
    data.write_bytes(text)
    quiet = ["--validate-every", "0", "--final-windows", "1", "--sample-length", "0"]
    where = ["--data", str(data), "--out", str(folder / "run"), "--overwrite"]
    length = ["--steps", str(steps), "--checkpoint-every", "0"]
    run("train", *where, *length, *quiet, *flags, processes=processes)
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def seconds_per_step(flags: list[str], tokens: int, steps: int, processes: int) -> float:
    text = np.random.default_rng(7).integers(0, 256, 200_000, dtype=np.uint8).tobytes()
    with tempfile.TemporaryDirectory() as folder:
        notes = train(text, flags, steps, Path(folder), processes)
    # The first step has cold caches and fetches its memory.
    return tokens / statistics.median(note["tokens_per_second"] for note in notes[1:])


def generate(checkpoint: Path, prompt: bytes, length: int, dtype: str) -> tuple[bytes, float]:
    """The likeliest bytes, and the seconds for all of them."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(prompt)
        greedy = ["--temperature", "0", "--prompt-file", file.name]
        model = ["--checkpoint", str(checkpoint), "--dtype", dtype]
        text, report = run("generate", *model, *greedy, "--length", str(length))
    first = re.search(r"first token: ([\d.]+) ms; then (\d+) tokens, ([\d.]+) tokens/s", report)
    if first is None:
        raise RuntimeError(f"gateloop generate reported no times: {report[-300:]}")
    return text, float(first[1]) / 1e3 + float(first[2]) / float(first[3])
