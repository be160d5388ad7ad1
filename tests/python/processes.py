"""`gateloop train` in several processes, as a launcher starts them."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gateloop_cpp import _files

# A process that hangs shall fail its test, not the whole run.
TIMEOUT = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(**variables: object) -> dict[str, str]:
    """This process's environment, without the variables of a launcher above it."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_", "OMP_"))
        and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    return inherited | {name: str(value) for name, value in variables.items()}


def torchrun_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives process `rank` of `size` on one machine."""
    return environment(
        RANK=rank,
        WORLD_SIZE=size,
        LOCAL_RANK=rank,
        LOCAL_WORLD_SIZE=size,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )


class Job:
    """Processes under way. Leaving the scope kills what is left of them."""

    def __init__(
        self,
        command: Sequence[object],
        environments: Sequence[dict[str, str]],
        prefixes: Sequence[Sequence[str]] | None = None,
        cwd: Path | None = None,
    ) -> None:
        prefixes = prefixes or [()] * len(environments)
        self.processes = [
            subprocess.Popen(
                # Whoever runs the tests may ignore some signals.
                [*prefix, "env", "--default-signal", *map(str, command)],
                env=variables,
                cwd=cwd,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for prefix, variables in zip(prefixes, environments, strict=True)
        ]

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.communicate()

    def signal(self, rank: int, number: int) -> None:
        self.processes[rank].send_signal(number)

    def outcomes(self) -> list[tuple[int, str, str]]:
        """Exit code, standard output and standard error of each process, once all have ended."""
        deadline = time.monotonic() + TIMEOUT
        found = []
        for process in self.processes:
            out, err = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            found.append((process.returncode, out, err))
        return found

    def check(self) -> list[str]:
        """Standard outputs of processes that all succeed."""
        outcomes = self.outcomes()
        assert [code for code, _, _ in outcomes] == [0] * len(outcomes), outcomes
        return [out for _, out, _ in outcomes]


def start(command: Sequence[object], size: int) -> Job:
    """`size` processes on this machine, as torchrun starts them; one alone without a launcher."""
    port = free_port()
    several = [torchrun_environment(rank, size, port) for rank in range(size)]
    return Job(command, several if size > 1 else [environment()])


def records(run: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, without what a clock put into them."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in CLOCKS}
        for line in lines
        if line.endswith("}")
    ]


CLOCKS = ("tokens_per_second", "elapsed_seconds")


def saved_step(run: Path) -> int:
    """The step from which a run would go on; 0 where no checkpoint was written."""
    state = run / "training_state.safetensors"
    return int(_files.read_metadata(state)["step"]) if state.exists() else 0


def wait_for_step(run: Path, step: int, job: Job) -> None:
    """Returns once the log of a run that goes on holds `step`."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if any(process.poll() is not None for process in job.processes):
            raise AssertionError(f"ended before step {step}: {job.outcomes()}")
        try:
            if records(run)[-1]["step"] >= step:
                return
        except (OSError, IndexError, ValueError):
            pass
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within {TIMEOUT} s")


def torchrun(size: int, *options: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(size), "--no-python", *options),
    ]
