"""How training scales to processes past this machine: formulas, counts, a simulation.

    python -m benchmarks.scaling            draws docs/scaling.svg, fills in docs/scaling.md
    python -m benchmarks.scaling --measure  counts and times first; as root

Everything in the document is in benchmarks/results/scaling.json.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT, cores, package, processor, revision
from benchmarks.measure import environment_of, packages
from benchmarks.report import table, with_table

RECORD = ROOT / "benchmarks" / "results" / "scaling.json"
DOCUMENT = ROOT / "docs" / "scaling.md"
PLOT = ROOT / "docs" / "scaling.svg"
PROCESSES = [2**i for i in range(3, 13)]
TARGET = 0.8
GROUP = 8  # processes that share a sequence
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # c10d's kDefaultFirstBucketBytes, kDefaultBucketBytesCap
# The model of the measured steps.
DIM, DEPTH, BATCH = 512, 6, 16


# ---- Formulas: bytes that all P processes send together, and messages that follow each other -----


def all_reduce_bytes(bytes_: float, processes: int) -> float:
    """A ring: P - 1 steps that sum parts of n / P, P - 1 that spread them."""
    return 2 * (processes - 1) * bytes_


def broadcast_bytes(bytes_: float, processes: int) -> float:
    return (processes - 1) * bytes_


def all_gather_bytes(bytes_: float, processes: int) -> float:
    """Of what each process has."""
    return processes * (processes - 1) * bytes_


def zero_bytes(bytes_: float, processes: int) -> float:
    """ZeRO-1: gradients are all-reduced, then each process broadcasts the weights it updated."""
    return all_reduce_bytes(bytes_, processes) + broadcast_bytes(bytes_, processes)


# States of a block that a layer gathers: A, X forward; A, Γ and the final state's gradient back.
STATES_FORWARD, STATES_BACK = 2, 3


def state_bytes(batch: int, dim: int, states: int = 1) -> int:
    """Each is a complex64 number a channel and sequence."""
    return states * 8 * batch * dim


def time_sharded_bytes(batch: int, dim: int, depth: int, processes: int) -> float:
    """A gather forward and one back in every layer. And two collectives for the loss."""
    states = state_bytes(batch, dim, STATES_FORWARD + STATES_BACK)
    tokens = all_gather_bytes(first_tokens_bytes(batch), processes)
    targets = all_reduce_bytes(TARGETS_BYTES, processes)
    return depth * all_gather_bytes(states, processes) + tokens + targets


TARGETS_BYTES = 8  # the number of targets of a loss, int64


def first_tokens_bytes(batch: int) -> int:
    """Of each sequence the first token of a block, and the block's length: int64."""
    return 8 * (batch + 1)


# ---- The simulation ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What one process runs on."""

    name: str
    step: float  # seconds of forward, backward and update
    batch: int
    host: float  # seconds a byte sent: copies and sums at its ends


@dataclass(frozen=True)
class Fabric:
    name: str
    bandwidth: float  # bytes/s each way
    latency: float  # seconds a message


@dataclass(frozen=True)
class Option:
    name: str
    sent: float = 1  # of float32's bytes
    zero: bool = False
    batch: int = 1  # times as many sequences a process
    group: int = 1  # processes that share a sequence, 0: all


FABRICS = (
    Fabric("10 GbE", 1.25e9, 50e-6),
    Fabric("100 GbE", 12.5e9, 10e-6),
    Fabric("NVLink", 450e9, 3e-6),
)
OPTIONS = (
    Option("data parallel"),
    Option("bfloat16 gradients", sent=0.5),
    Option("ZeRO-1", zero=True),
    Option("batch × 4", batch=4),
    Option("batch × 4, bfloat16", batch=4, sent=0.5),
    Option("batch × 16, bfloat16", batch=16, sent=0.5),
    Option(f"time over {GROUP}", group=GROUP),
    Option("time over all", group=0),
)


def ring(bytes_: float, steps: int, parts: int, machine: Machine, fabric: Fabric) -> float:
    """Seconds in which each process sends ``steps`` messages of a ``parts``-th of the bytes."""
    each = bytes_ / parts
    return steps * (fabric.latency + each * (1 / fabric.bandwidth + machine.host))


def buckets(parameters: Sequence[int]) -> list[int]:
    """Bytes of c10d's buckets: gradients are ready from the last parameter to the first."""
    found, limit, size = [], FIRST_BUCKET, 0
    for numel in reversed(parameters):
        size += 4 * numel
        if size >= limit:
            found.append(size)
            limit, size = BUCKET, 0
    return [*found, size] if size else found


def seconds(
    machine: Machine, fabric: Fabric, option: Option, processes: int, parameters: Sequence[int]
) -> float:
    """Of a step. A third is the forward pass. Gradients come evenly over the rest, by their bytes;
    a bucket is reduced when it is full and the one before it has been."""
    compute = machine.step * option.batch
    sizes = buckets(parameters)
    now, done, ready = compute / 3, 0.0, 0
    for size in sizes:
        ready += size
        full = compute / 3 + compute * 2 / 3 * ready / sum(sizes)
        steps = 2 * (processes - 1)
        now = max(now, full) + ring(size * option.sent, steps, processes, machine, fabric)
        done = now
    total = max(done, compute)
    if option.zero:
        total += ring(sum(sizes), processes - 1, processes, machine, fabric)
    if option.group != 1:
        group = min(option.group or processes, processes)
        batch = machine.batch * option.batch
        # A gather each way in every layer, for which the layer waits.
        for states in (STATES_FORWARD, STATES_BACK):
            sent = state_bytes(batch, DIM, states)
            total += DEPTH * ring(sent, group - 1, 1, machine, fabric)
        total += ring(first_tokens_bytes(batch), group - 1, 1, machine, fabric)
        total += ring(TARGETS_BYTES, 2 * (group - 1), group, machine, fabric)
    return total


def efficiency(
    machine: Machine, fabric: Fabric, option: Option, processes: int, parameters: Sequence[int]
) -> float:
    alone = machine.step * option.batch
    return alone / seconds(machine, fabric, option, processes, parameters)


def machines(record: dict[str, Any]) -> list[Machine]:
    return [Machine(**fields) for fields in record["machines"]]


def simulated(record: dict[str, Any]) -> Iterator[tuple[Machine, Fabric, Option, list[float]]]:
    for machine in machines(record):
        for fabric in FABRICS:
            for option in OPTIONS:
                at = partial(efficiency, machine, fabric, option, parameters=record["parameters"])
                yield machine, fabric, option, [at(processes=p) for p in PROCESSES]


# ---- Measurements --------------------------------------------------------------------------------


def count(processes: int, build: Path) -> dict[str, Any]:
    """In a network namespace, whose loopback interface is its own."""
    worker = shlex.join([sys.executable, "-m", "benchmarks.scaling_counts", str(processes)])
    command = f"ip link set lo up && exec {worker}"
    variables = environment_of(build) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", command],
        cwd=ROOT,
        env=os.environ | variables | {"PYTHONPATH": os.pathsep.join(packages(ROOT))},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    return dict(json.loads(done.stdout))


def measure(build: Path) -> dict[str, Any]:
    counts = [count(processes, build) for processes in (2, 3)]
    results = ROOT / "benchmarks" / "results"
    cpu = next(
        row["values"]
        for row in json.loads((results / "model.json").read_text(encoding="utf-8"))["rows"]
        if row["contender"] == "gateloop train" and row["which"] == "float32"
    )
    gpu = json.loads((results / "gpu_h100.json").read_text(encoding="utf-8"))
    h100 = next(
        row["milliseconds"]
        for row in gpu["rows"]
        if row["contender"] == "ours" and row["problem"] == "training step bfloat16 (8, 2048, 512)"
    )
    # Between two processes a byte of a bucket is sent once by each.
    host = counts[0]["bucket_seconds"] / BUCKET
    # A byte is copied three times: read, summed, written.
    h100_host = 3 / (gpu["copy_gigabytes_per_second"] * 1e9)
    return {
        "environment": {
            "machine": f"{processor()}, {cores()} cores",
            "torch": package("torch"),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "revision": revision(),
            "load": round(os.getloadavg()[0], 1),
        },
        "parameters": counts[0].pop("parameters"),
        "counts": counts,
        "machines": [
            {"name": "2 CPU cores", "step": statistics.median(cpu), "batch": BATCH, "host": host},
            {"name": "H100", "step": h100 / 1e3, "batch": 8, "host": h100_host},
        ],
    }


# ---- The document --------------------------------------------------------------------------------


def expectations(record: dict[str, Any]) -> dict[str, Callable[[int], float]]:
    model = 4 * sum(record["parameters"])
    return {
        "all-reduce of a bucket": partial(all_reduce_bytes, BUCKET),
        "all-reduce of a bucket, bfloat16": partial(all_reduce_bytes, BUCKET / 2),
        "broadcast of a bucket": partial(broadcast_bytes, BUCKET),
        "all-gather of a state": partial(all_gather_bytes, state_bytes(BATCH, DIM)),
        "data parallel step": partial(all_reduce_bytes, model),
        "ZeRO-1 step": partial(zero_bytes, model),
        "time-sharded step": partial(time_sharded_bytes, BATCH, DIM, DEPTH),
    }


def counts_table(record: dict[str, Any]) -> str:
    lines = []
    for name, formula in expectations(record).items():
        line = [name]
        for found in record["counts"]:
            expected, sent = formula(found["processes"]), found["counts"][name]["bytes"]
            line += [f"{expected:,.0f}", f"{sent:,}", f"{sent / expected:.3f}"]
        lines.append([*line, str(record["counts"][0]["counts"][name]["collectives"])])
    header = ["what"]
    for found in record["counts"]:
        p = found["processes"]
        header += [f"P = {p}, formula", "sent", "ratio"]
    return table([*header, "collectives"], lines)


def limit(efficiencies: Sequence[float]) -> str:
    """The least number of processes below the target."""
    below = (p for p, value in zip(PROCESSES, efficiencies, strict=True) if value < TARGET)
    found = next(below, None)
    return "–" if found is None else f"{found:,}"


def limits_table(record: dict[str, Any]) -> str:
    lines: dict[tuple[str, str], list[str]] = {}
    for machine, fabric, _, values in simulated(record):
        lines.setdefault((machine.name, fabric.name), []).append(limit(values))
    names = [option.name for option in OPTIONS]
    return table(["process", "network", *names], [[*key, *line] for key, line in lines.items()])


def efficiencies_table(record: dict[str, Any]) -> str:
    lines = [
        [machine.name, fabric.name, *(f"{100 * value:.0f}" for value in values)]
        for machine, fabric, option, values in simulated(record)
        if option == OPTIONS[0]
    ]
    return table(["process", "network", *(f"{p:,}" for p in PROCESSES)], lines)


def facts(record: dict[str, Any]) -> str:
    found, parameters = record["environment"], record["parameters"]
    sizes = ", ".join(f"{size / 2**20:.1f}" for size in buckets(parameters))
    processes = "; ".join(
        f"{m.name}: step {1e3 * m.step:,.1f} ms, {1e9 * m.host:.2g} ns a byte sent"
        for m in machines(record)
    )
    times = ", ".join(
        f"{1e3 * counts['bucket_seconds']:.0f} ms between {counts['processes']} processes"
        for counts in record["counts"]
    )
    return (
        f"Model: {sum(parameters):,} parameters; buckets of {sizes} MiB. {processes}. A bucket of "
        f"25 MiB through the loopback interface: {times}.\n\nCounted on {found['machine']}, "
        f"torch {found['torch']}, {found['date']}, revision {found['revision']}; load "
        f"{found['load']}, so that times between processes are upper bounds."
    )


PARTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "counts": counts_table,
    "facts": facts,
    "efficiencies": efficiencies_table,
    "limits": limits_table,
}


def filled(document: str, record: dict[str, Any]) -> str:
    for name, part in PARTS.items():
        document = with_table(document, name, part(record))
    return document


def draw(record: dict[str, Any], file: Path) -> None:
    # Only whoever draws needs it.
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # equal numbers give an equal file
    from matplotlib import pyplot

    rows = [machine.name for machine in machines(record)]
    columns = [fabric.name for fabric in FABRICS]
    figure, panels = pyplot.subplots(
        len(rows), len(columns), figsize=(11, 6.5), sharex=True, sharey=True
    )
    for machine, fabric, option, values in simulated(record):
        panel = panels[rows.index(machine.name)][columns.index(fabric.name)]
        panel.plot(PROCESSES, values, marker="o", markersize=3, label=option.name)
        panel.set_title(f"{machine.name} a process, {fabric.name}", fontsize="medium")
    for panel in panels.flat:
        panel.axhline(TARGET, color="black", linewidth=0.8, linestyle=":")
        panel.set_xscale("log", base=2)
        panel.set_ylim(0, 1.05)
        panel.grid(alpha=0.3)
    for panel in panels[:, 0]:
        panel.set_ylabel("efficiency")
    for panel in panels[-1]:
        panel.set_xlabel("processes")
    panels[0][0].legend(fontsize="x-small", loc="lower left")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="count and time first")
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "release", metavar="DIR")
    chosen = parser.parse_args()
    if chosen.measure:
        record = measure(chosen.build)
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    draw(record, PLOT)
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(filled(text, record), encoding="utf-8")


if __name__ == "__main__":
    main()
