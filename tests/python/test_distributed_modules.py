"""The modules in two processes: DistributedDataParallel, FSDP2, tensor parallelism, accelerate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed_cases import CASES, PROCESSES

import gateloop_cpp

# All cases together take 27 s of processor time; a machine may be busy.
SECONDS = 240


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of each process, case by case: starting one with torch takes seconds, so all run in two."""
    folder = tmp_path_factory.mktemp("two_processes")
    source = str(Path(gateloop_cpp.__file__).parents[1])
    # What accelerate reads: without a number of threads it sets its own, in all of the process.
    shared = {"MASTER_ADDR": "localhost", "MASTER_PORT": "0", "WORLD_SIZE": str(PROCESSES)}
    shared |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": source}
    workers = [
        subprocess.Popen(
            [sys.executable, Path(__file__).with_name("distributed_cases.py"), str(rank)],
            cwd=folder,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        for worker in workers:
            _, stderr = worker.communicate(timeout=SECONDS)
            assert worker.returncode == 0, stderr
    finally:
        for worker in workers:
            worker.kill()
    files = [folder / f"{rank}.json" for rank in range(PROCESSES)]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, results: list[dict[str, str]]) -> None:
    for rank, result in enumerate(results):
        outcome = result.get(case, "not reached: a case before it failed")
        assert outcome == "passed", f"process {rank}: {outcome}"
