#!/usr/bin/env python3
"""Our operators against the reference peer's scans and a plain elementwise pass.

First the results are compared, then all contenders are timed in turn, round after round, so that a
busy moment of the machine falls on all of them; the medians are reported. The peer gets its inputs
in the layout it likes best, outside the timing.
"""

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # The peer's use of torch.jit is its own affair.
    from gateloop_transformer import gateloop_transformer as peer
    from gateloop_transformer import simplified_gate_loop as simple_peer
    from gateloop_transformer.associative_scan import associative_scan

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(1, 16384, 512), (4, 1024, 512), (16, 256, 512)]
# float32 sums in another order: values are of order 10, and the error grows with the length.
RTOL, ATOL = 1e-4, 1e-3

Run = Callable[[], Tensor]


@dataclass
class Problem:
    """The same function computed by us and by the peer, on the same numbers."""

    name: str
    inputs: list[Tensor]
    ours: Run
    peers: Run
    peers_inputs: list[Tensor]
    to_our_layout: Callable[[Tensor], Tensor]


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().requires_grad_()


def linear_recurrence(ops: Any, shape: tuple[int, int, int]) -> Problem:
    a, x = leaf(torch.randn(shape).sigmoid()), leaf(torch.randn(shape))
    return Problem(
        "linear_recurrence",
        [a, x],
        lambda: ops.linear_recurrence(a, x)[0],
        lambda: associative_scan(simple_peer.binary_operator, (a, x))[1],
        [a, x],
        lambda y: y,
    )


def simple_gate_loop(ops: Any, shape: tuple[int, int, int]) -> Problem:
    q, kv, z = (leaf(torch.randn(shape)) for _ in range(3))
    return Problem(
        "simple_gate_loop",
        [q, kv, z],
        lambda: ops.simple_gate_loop(q, kv, z)[0],
        lambda: simple_peer.gate_loop_operator(q, kv, z.sigmoid())[0],
        [q, kv, z],
        lambda y: y,
    )


def gate_loop(ops: Any, shape: tuple[int, int, int]) -> Problem:
    batch, time_steps, channels = shape
    q, k, v = (leaf(torch.randn(shape)) for _ in range(3))
    z = leaf(torch.randn(batch, time_steps, 2 * channels))

    def by_head(t: Tensor) -> Tensor:  # (B, T, D, ...) -> (B D, T, ...)
        return t.movedim(2, 1).flatten(0, 1)

    heads = [leaf(by_head(t).unsqueeze(-1)) for t in (q, k, v)]
    raw = leaf(by_head(z.detach().unflatten(2, (channels, 2)))[:, :, None, None])

    def peers() -> Tensor:
        gate = torch.view_as_complex(raw)
        magnitude = gate.abs()
        a = magnitude.sigmoid() * gate / magnitude
        return torch.as_tensor(peer.gate_loop_operator(*heads, a))

    return Problem(
        "gate_loop",
        [q, k, v, z],
        lambda: ops.gate_loop(q, k, v, z)[0],
        peers,
        [*heads, raw],
        lambda y: y.unflatten(0, (batch, channels)).squeeze(-1).movedim(1, 2),
    )


def forward_only(run: Run) -> Callable[[], None]:
    def timed() -> None:
        with torch.no_grad():
            run()

    return timed


def with_backward(run: Run, inputs: list[Tensor], gradient: Tensor) -> Callable[[], None]:
    def timed() -> None:
        torch.autograd.grad(run(), inputs, gradient)

    return timed


def elementwise(shape: tuple[int, int, int]) -> Callable[[], None]:
    """Three sequences read and one written, as the simple gate does: what memory allows."""
    q, kv, z, out = (torch.randn(shape) for _ in range(4))

    def timed() -> None:
        torch.addcmul(q, kv, z, out=out)

    return timed


def interleaved_medians(contenders: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for contender in contenders.values():
        contender()
    for _ in range(rounds):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(problem: Problem, shape: tuple[int, int, int], rounds: int) -> list[dict[str, Any]]:
    y = problem.ours()
    peers_y = problem.peers()
    torch.testing.assert_close(problem.to_our_layout(peers_y), y, rtol=RTOL, atol=ATOL)
    gradient, peers_gradient = torch.randn_like(y), torch.randn_like(peers_y)
    medians = interleaved_medians(
        {
            "elementwise": elementwise(shape),
            "ours, forward": forward_only(problem.ours),
            "peer, forward": forward_only(problem.peers),
            "ours, forward + backward": with_backward(problem.ours, problem.inputs, gradient),
            "peer, forward + backward": with_backward(
                problem.peers, problem.peers_inputs, peers_gradient
            ),
        },
        rounds,
    )
    return [
        {
            "operator": problem.name,
            "shape": list(shape),
            "pass": which,
            "ours_ms": 1e3 * medians[f"ours, {which}"],
            "peer_ms": 1e3 * medians[f"peer, {which}"],
            "elementwise_ms": 1e3 * medians["elementwise"],
        }
        for which in ("forward", "forward + backward")
    ]


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| operator | (B, T, D) | pass | ours | peer | peer / ours | ours / elementwise |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        shape = ", ".join(f"{n:,}" for n in row["shape"])
        lines.append(
            f"| {row['operator']} | ({shape}) | {row['pass']} | {row['ours_ms']:.2f} ms"
            f" | {row['peer_ms']:.1f} ms | {row['peer_ms'] / row['ours_ms']:.1f}"
            f" | {row['ours_ms'] / row['elementwise_ms']:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "release")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()

    torch.ops.load_library(str(options.build / "lib" / "libgateloop_ops.so"))
    torch.manual_seed(1)
    rows = []
    for make in (linear_recurrence, simple_gate_loop, gate_loop):
        for shape in SHAPES:
            rows += measure(make(torch.ops.gateloop, shape), shape, options.rounds)
    machine = (
        f"{processor()}, {torch.get_num_threads()} threads of {os.cpu_count()}, float32,"
        f" torch {torch.__version__}, medians of {options.rounds} interleaved rounds"
    )
    report = f"{machine}\n\n{table(rows)}\n"
    print(report)
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / "peers.md").write_text(report)
    record = {"machine": machine, "rows": rows}
    (options.results / "peers.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
