"""Fifty kills at random moments: what was saved is whole, and nothing is lost but time."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Job, records, saved_step, start, wait_for_step

pytestmark = pytest.mark.long

KILLS = 50
SIZE = 3
CHECKPOINT_EVERY = 10
SMALL = (
    *("--dim", "16", "--depth", "2", "--dim-head", "8", "--heads", "2", "--length", "16"),
    *("--batch", "6", "--accumulation", "1", "--threads", "1", "--sample-length", "0"),
    *("--dtype", "float32", "--validation-windows", "9", "--schedule", "constant"),
    *("--validate-every", "25", "--checkpoint-every", str(CHECKPOINT_EVERY), "--shard-optimizer"),
    # A process killed before it has met the others is waited for as long as this.
    *("--timeout", "10"),
)


@pytest.fixture
def train(build_dir: Path, tmp_path: Path) -> Callable[..., Job]:
    text = tmp_path / "text"
    chooser = random.Random(1)
    text.write_text("".join(chooser.choice(("gate ", "loop ", "over\n")) for _ in range(9000)))

    def train(run: Path, *flags: str) -> Job:
        command = (build_dir / "gateloop", "train", "--data", text, "--out", run, *SMALL, *flags)
        return start(command, SIZE)

    return train


def logged_step(run: Path) -> int:
    lines = records(run) if (run / "metrics.jsonl").exists() else []
    return int(lines[-1]["step"]) if lines else 0


def test_fifty_kills(train: Callable[..., Job], tmp_path: Path) -> None:
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    chooser = random.Random(0)
    logged = saved = 0
    for kill in range(KILLS):
        # Resumed as soon as it is a run; killed before that, it is begun again.
        begun = (run / "config.json").exists()
        with train(run, *(("--resume",) if begun else ("--steps", "1000000000"))) as job:
            if kill % 2:  # after a step at least, however slowly this machine starts processes
                wait_for_step(run, logged + 1, job)
                time.sleep(chooser.uniform(0, 1))
            else:
                time.sleep(chooser.uniform(0, 3))
            victim = kill % SIZE
            job.signal(victim, signal.SIGKILL)
            codes = [code for code, _, _ in job.outcomes()]
        expected = [-signal.SIGKILL if rank == victim else 1 for rank in range(SIZE)]
        assert codes == expected
        # A step is in the log once the checkpoint due after the one before it is written.
        logged = logged_step(run)
        proven = max(0, logged - 1) // CHECKPOINT_EVERY * CHECKPOINT_EVERY
        before, saved = saved, saved_step(run)
        assert max(before, proven) <= saved <= logged
    assert saved > 0

    with train(run, "--resume") as job:
        # The log of a broken run may be ahead of its checkpoint: it is cut back on resuming.
        time.sleep(2)
        wait_for_step(run, 200, job)
        job.signal(1, signal.SIGTERM)
        assert [code for code, _, _ in job.outcomes()] == [128 + signal.SIGTERM] * SIZE
    steps = int(records(run)[-1]["step"])
    with train(unbroken, "--steps", str(steps)) as job:
        job.check()
    # The last step of a finished run has a validation more.
    assert records(run)[:-1] == records(unbroken)[:-1]
