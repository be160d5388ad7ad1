"""The kernels alone, from the C++ benchmark: it validates, interleaves and has the floor itself."""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import cores


@dataclass(frozen=True)
class Kernel:
    name: str  # operation/BxTxD
    ms: float
    over_floor: float  # time over that of an elementwise pass over the same arrays
    speedup: float  # over one thread


def parse(file: Path) -> list[Kernel]:
    lines = json.loads(file.read_text(encoding="utf-8"))["benchmarks"]
    wrong = [
        f"{line['name']}: {line['error_message']}" for line in lines if "error_message" in line
    ]
    if wrong:
        raise RuntimeError("; ".join(wrong))
    return [
        Kernel(
            line["name"].partition("/iterations")[0],
            line["ms"],
            line["ratio"],
            line["speedup"],
        )
        for line in lines
    ]


def run(binary: Path, file: Path, only: str | None = None) -> list[Kernel]:
    """`only`: a regular expression on the names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    command = [str(binary), f"--benchmark_out={file}", "--benchmark_out_format=json"]
    if only is not None:
        command.append(f"--benchmark_filter={only}")
    environment = os.environ | {"GATELOOP_BENCHMARK_THREADS": str(cores())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{binary} failed: {done.stderr}")
    content = json.loads(file.read_text(encoding="utf-8"))
    for private in ("host_name", "executable"):
        content["context"].pop(private, None)
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    kernels = parse(file)
    if not kernels:
        raise RuntimeError(f"{binary} has no benchmark that matches {only}")
    return kernels
