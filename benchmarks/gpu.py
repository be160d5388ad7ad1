"""Measures the CUDA kernels beside the device's copy bandwidth and beside their peers.

Every contender of a problem is held against ours before it is timed. Times are medians by the
device's events, after warm-up; arrays are larger than the L2 cache.

    python -m benchmarks.gpu                      everything there is a peer for
    python -m benchmarks.gpu --out FILE.json      the numbers, with the card's name
    python -m benchmarks.gpu --device cpu --tiny  whether it all still runs, without a GPU
"""

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gateloop_cpp

OPS = torch.ops.gateloop
BLOCK = 16  # steps between saved states
# A dispatch key without kernels: its calls reach the definitions.
_WITHOUT_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1)
Call = Callable[[], Any]


class Row(NamedTuple):
    """One contender of one problem."""

    problem: str
    contender: str
    milliseconds: float
    gigabytes_per_second: float | None = None  # of the least bytes: inputs, outputs, saved states
    share: float | None = None  # of the copy bandwidth
    peak_gib: float | None = None


class Bench:
    """A device, its clock and its copy bandwidth."""

    def __init__(self, device: str, tiny: bool) -> None:
        self.device, self.tiny = torch.device(device), tiny
        self.rows: list[Row] = []
        numbers = 1 << (16 if tiny else 28)
        source = self.draw(numbers)
        target = torch.empty_like(source)
        milliseconds = self.time(lambda: target.copy_(source))
        self.copy = 2 * source.nbytes / milliseconds / 1e6

    def draw(self, *sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*sizes, device=self.device).to(dtype)

    def time(self, call: Call, repeats: int = 20) -> float:
        """Milliseconds, the median."""
        repeats = 2 if self.tiny else repeats
        for _ in range(1 if self.tiny else 4):
            call()
        if self.device.type == "cpu":
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
            return statistics.median(times)
        marks = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(repeats)
        ]
        for start_mark, end_mark in marks:
            start_mark.record()
            call()
            end_mark.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in marks)

    def add(self, problem: str, contender: str, call: Call, size: int = 0, **more: Any) -> None:
        milliseconds = self.time(call, **more)
        speed = size / milliseconds / 1e6 if size else None
        share = None if speed is None else speed / self.copy
        self.say(Row(problem, contender, milliseconds, speed, share))

    def say(self, row: Row) -> None:
        self.rows.append(row)
        words = [f"{row.problem:54s} {row.contender:22s} {row.milliseconds:10.3f} ms"]
        if row.gigabytes_per_second is not None and row.share is not None:
            words.append(f"{row.gigabytes_per_second:6.0f} GB/s {row.share:5.0%} of a copy")
        if row.peak_gib is not None:
            words.append(f"{row.peak_gib:6.2f} GiB")
        print(*words, flush=True)


def shapes(tiny: bool) -> list[tuple[int, int, int]]:
    return [(2, 40, 6)] if tiny else [(8, 8192, 1536), (1, 65536, 1536), (64, 1024, 512)]


def scans(bench: Bench) -> None:
    """Forward and backward of each kernel, as a share of the copy bandwidth."""
    for shape in shapes(bench.tiny):
        batch, steps, width = shape
        for dtype in (torch.float32, torch.bfloat16):
            numbers = batch * steps * width * dtype.itemsize
            states = batch * -(-steps // BLOCK) * width * 4  # float32
            draw = partial(bench.draw, *shape, dtype=dtype)
            a, q, k, v, dy = draw().sigmoid(), draw(), draw(), draw(), draw()
            z = bench.draw(batch, steps, 2 * width, dtype=dtype)
            name = f"{str(dtype).removeprefix('torch.')} {shape}"

            linear = partial(OPS.linear_recurrence, a, k, None, False)
            bench.add(f"linear forward {name}", "ours", linear, 3 * numbers)
            h, _ = linear()
            back = partial(OPS._linear_recurrence_backward, dy, None, a, h, None, False)
            bench.add(f"linear backward {name}", "ours", back, 5 * numbers)

            polar = partial(OPS._polar_gate_loop_forward, q, k, v, z, None, False)
            bench.add(f"polar forward {name}", "ours", polar, 6 * numbers + 2 * states)
            saved = polar()[2]
            back = partial(OPS._polar_gate_loop_backward, dy, None, q, k, v, z, saved, False)
            bench.add(f"polar backward {name}", "ours", back, 11 * numbers + 2 * states)

            simple = partial(OPS._simple_gate_loop_forward, q, k, v, None, False, False)
            bench.add(f"simple forward {name}", "ours", simple, 4 * numbers + states)
            saved = simple()[2]
            back = partial(OPS._simple_gate_loop_backward, dy, None, q, k, v, saved, False, False)
            bench.add(f"simple backward {name}", "ours", back, 7 * numbers + states)


def optional(name: str) -> Any | None:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a peer that is absent, or does not build here
        print(f"{name}: left out, {type(error).__name__}: {str(error)[:100]}")
        return None


def real_scans(bench: Bench) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor], bool]]:
    """h_t = a_t h_{t-1} + x_t by each: a name, a function, whether it takes (B, C, T)."""
    yield "ours", lambda a, x: OPS.linear_recurrence(a, x)[0], False
    if bench.device.type == "cuda" and (warp := optional("accelerated_scan.warp")):
        yield "accelerated-scan warp", warp.scan, True
    if bench.device.type == "cuda" and (hgrn := optional("fla.ops.hgrn")):
        # Its gates are logarithms; taking them is not timed as part of it.
        yield "fla chunk_hgrn", lambda g, x: hgrn.chunk_hgrn(x, g)[0], False
        yield "fla fused_recurrent", lambda g, x: hgrn.fused_recurrent_hgrn(x, g)[0], False

    def combine(first: tuple[Tensor, ...], then: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return first[0] * then[0], then[0] * first[1] + then[1]

    if torchs := optional("torch._higher_order_ops.associative_scan"):
        # Its one kernel is generated by torch.compile, and for GPUs alone.
        mode = "pointwise" if bench.device.type == "cuda" else "generic"

        def associative(a: Tensor, x: Tensor) -> Tensor:
            scanned: Tensor = torchs.associative_scan(combine, (a, x), 1, combine_mode=mode)[1]
            return scanned

        compiled = torch.compile(associative) if mode == "pointwise" else associative
        yield "torch associative_scan", compiled, False
    if peer := optional("gateloop_transformer.associative_scan"):

        def reference(a: Tensor, x: Tensor) -> Tensor:
            scanned: Tensor = peer.associative_scan(combine, (a, x))[1]
            return scanned

        yield "reference", reference, False


def peers(bench: Bench) -> None:
    """One real scan by all, forward, and forward with backward."""
    for shape in [(2, 64, 32)] if bench.tiny else [(8, 8192, 1536), (8, 2048, 512)]:
        for dtype in (torch.float32, torch.bfloat16):
            a, x = bench.draw(*shape).sigmoid(), bench.draw(*shape)
            expected = OPS.linear_recurrence(a, x)[0]
            for name, scan, channels_first in real_scans(bench):
                given = [a.log() if name.startswith("fla") else a, x]
                given = [t.transpose(1, 2).contiguous() if channels_first else t for t in given]
                leaves = [t.to(dtype).requires_grad_() for t in given]
                problem = f"real scan {str(dtype).removeprefix('torch.')} {shape}"
                try:
                    found = scan(*leaves)
                    seen = found.transpose(1, 2) if channels_first else found
                    error = float((seen.detach().float() - expected).norm() / expected.norm())
                    if not error < (1e-4 if dtype == torch.float32 else 5e-2):
                        print(f"{problem} {name}: wrong by {error:.1e}, not timed")
                        continue
                    weights = torch.randn_like(found)
                    del found, seen
                    forward = partial(no_grad, scan, *leaves)
                    bench.add(f"{problem} forward", name, forward, repeats=10)
                    both = partial(forward_and_backward, scan, leaves, weights)
                    bench.add(f"{problem} forward + backward", name, both, repeats=10)
                except (RuntimeError, AssertionError) as error:  # out of memory, a shape
                    print(f"{problem} {name}: {type(error).__name__}: {str(error)[:100]}")
                    free(bench)


def no_grad(function: Callable[..., Any], *given: Tensor) -> Any:
    with torch.no_grad():
        return function(*given)


def forward_and_backward(
    function: Callable[..., Tensor], leaves: list[Tensor], weights: Tensor
) -> None:
    torch.autograd.grad(function(*leaves), leaves, weights)


def free(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.empty_cache()


def definitions(bench: Bench) -> None:
    """What a device without kernels runs."""
    shape = (2, 40, 6) if bench.tiny else (8, 2048, 512)
    q, k, v = (bench.draw(*shape) for _ in range(3))
    z = bench.draw(*shape[:2], 2 * shape[2])
    operator = OPS.polar_gate_loop.default
    bench.add(f"polar forward {shape}", "ours", partial(operator, q, k, v, z))
    slow = partial(operator.redispatch, _WITHOUT_KERNELS, q, k, v, z, None, False, None, None)
    bench.add(f"polar forward {shape}", "its definition", partial(no_grad, slow), repeats=5)


def steps(bench: Bench) -> None:
    """One step of decoding."""
    for batch in (1, 64):
        q, k, v = (bench.draw(batch, 1, 512) for _ in range(3))
        z = bench.draw(batch, 1, 1024)
        step = partial(OPS.polar_gate_loop, q, k, v, z)
        bench.add(f"polar step, {batch} x 512", "ours", step, repeats=100)
        if bench.device.type == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            bench.add(f"polar step, {batch} x 512", "ours, in a graph", graph.replay, repeats=100)


def norms(bench: Bench) -> None:
    rows, width = (8, 6) if bench.tiny else (65536, 1536)
    for dtype in (torch.float32, torch.bfloat16):
        x, dy = (bench.draw(rows, width, dtype=dtype) for _ in range(2))
        gamma = torch.ones(width, device=bench.device, dtype=dtype)
        name = f"{str(dtype).removeprefix('torch.')} ({rows}, {width})"
        size = x.nbytes
        bench.add(f"RMSNorm forward {name}", "ours", partial(OPS.rms_norm, x, gamma), 2 * size)
        theirs = partial(F.rms_norm, x, (width,), gamma)
        bench.add(f"RMSNorm forward {name}", "torch's rms_norm", theirs, 2 * size)
        back = partial(OPS._rms_norm_backward, dy, x, gamma)
        bench.add(f"RMSNorm backward {name}", "ours", back, 3 * size)
        leaves = [x.clone().requires_grad_(), gamma.clone().requires_grad_()]
        out = F.rms_norm(leaves[0], (width,), leaves[1])
        back = partial(torch.autograd.grad, out, leaves, dy, retain_graph=True)
        bench.add(f"RMSNorm backward {name}", "torch's rms_norm", back, 3 * size)


def training_step(model: nn.Module, ids: Tensor, optimizer: Any, low: bool) -> None:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=low):
        loss = model(ids, return_loss=True)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def training(bench: Bench) -> None:
    """A whole step of a Transformer: forward, backward, AdamW."""
    batch, time_steps, dim, depth = (2, 16, 8, 1) if bench.tiny else (8, 2048, 512, 6)
    ids = torch.randint(0, 256, (batch, time_steps + 1), device=bench.device)
    models: dict[str, Any] = {"ours": gateloop_cpp.Transformer}
    if peer := optional("gateloop_transformer"):
        models["reference"] = peer.Transformer
    for low in (False, True):
        for name, make in models.items():
            torch.manual_seed(0)
            free(bench)
            model = make(num_tokens=256, dim=dim, depth=depth, use_gate_looped_attn=True)
            model.to(bench.device)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            problem = f"training step {'bfloat16' if low else 'float32'} {(batch, time_steps, dim)}"
            cuda = bench.device.type == "cuda"
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            try:
                step = partial(training_step, model, ids, optimizer, low)
                milliseconds = bench.time(step, repeats=5)
            except RuntimeError as error:
                print(f"{problem} {name}: {type(error).__name__}: {str(error)[:100]}")
                continue
            peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
            bench.say(Row(problem, name, milliseconds, peak_gib=peak))


PROBLEMS = (scans, peers, definitions, steps, norms, training)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    chosen = parser.parse_args()
    bench = Bench(chosen.device, chosen.tiny)
    cuda = bench.device.type == "cuda"
    card = torch.cuda.get_device_name(bench.device) if cuda else "CPU"
    print(f"{card}, torch {torch.__version__}: a copy moves {bench.copy:.0f} GB/s")
    for problem in PROBLEMS:
        problem(bench)
        free(bench)
    if chosen.out:
        results = {
            "card": card,
            "torch": torch.__version__,
            "copy_gigabytes_per_second": bench.copy,
            "rows": [row._asdict() for row in bench.rows],
        }
        chosen.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
