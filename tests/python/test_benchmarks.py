"""The benchmark: that it still runs, refuses what is wrong, and that its tables are its results."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import (
    base,
    contenders,
    generation,
    kernels,
    measure,
    model,
    oracle,
    program,
    report,
    timing,
)
from benchmarks.contenders import AbsentError, Array, Contender, Kind, Pass, Problem
from benchmarks.records import Row
from benchmarks.worker import Bench, FailedError
from conftest import ROOT, thinned

GROUPS = (
    *("operators", "generation", "memory", "layer", "model", "growth"),
    *("wide_heads", "ragged", "time_sharding", "definitions"),
)
# gateloop_jax is built only where jax is; the reference cannot run in bfloat16 weights.
MAY_BE_ABSENT = {("gateloop_jax", which) for which in ("forward", "forward + backward")} | {
    ("gateloop-transformer", "bfloat16"),
    ("gateloop-transformer", "float16"),
    # The runtime alone reads int8.
    ("gateloop-transformer", "int8"),
    ("gateloop_cpp", "int8"),
    ("matrix products", "int8"),
    # In bfloat16 all of torch's products come from oneDNN.
    ("matrix products, oneDNN", "bfloat16"),
}


@pytest.mark.parametrize("groups", thinned([(GROUPS[:3],), (GROUPS,)], 2))
def test_quick_benchmark_measures_everyone(
    groups: tuple[str, ...], build_dir: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "benchmarks.run", "--quick"]
    if groups != GROUPS:
        command += ["--only", "kernels|operators: simple|generation|memory: (gate|model)"]
    paths = ["--build", str(build_dir), "--results", str(tmp_path)]
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "kernels.json").read_text(encoding="utf-8"))["benchmarks"]
    for group in groups:
        rows = json.loads((tmp_path / f"{group}.json").read_text(encoding="utf-8"))["rows"]
        assert any(row["kind"] == "ours" and row["values"] for row in rows), group
        for row in rows:
            absent = (row["contender"], row["which"])
            assert row["values"] or absent in MAY_BE_ABSENT, row
            assert row["error"] is not None or row["kind"] == "floor" or row["absent"], row
    assert "growth" not in groups or (tmp_path / "growth.svg").stat().st_size > 0
    assert "| what | ours |" in (tmp_path / "bench.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("calls", "counts", "made"),
    [
        # Half a second untimed, then three.
        ([0.2, 0.1, 0.1, 0.1, 0.09, 0.03, 0.02, 0.01], 0.02, 7),
        # Three that do not take a tenth of a second are not enough.
        ([0.5, 0.03, 0.03, 0.03, 0.02, 0.01], 0.02, 5),
        ([5.0, 4.0, 3.0], 4.0, 2),
        ([11.0, 10.0], 11.0, 1),
    ],
)
def test_what_counts_of_calls_that_get_faster(
    calls: list[float], counts: float, made: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, left = [0.0], list(calls)

    def run() -> None:
        now[0] += left.pop(0)

    monkeypatch.setattr("benchmarks.timing.time.perf_counter", lambda: now[0])
    assert timing.seconds_of(run, at_least=0.1) == pytest.approx(counts)
    assert len(calls) - len(left) == made


# ---- What is wrong is not timed ------------------------------------------------------------------


class LocalWorker:
    """A worker in this process."""

    def __init__(self, problem: Problem) -> None:
        self.bench = Bench([problem], at_least=0.001)

    def call(self, method: str, *arguments: Any, timeout: float) -> Any:
        try:
            return getattr(self.bench, method)(*arguments)
        except ZeroDivisionError as reason:
            raise FailedError(str(reason)) from reason

    def stop(self) -> None:
        self.bench.rest()


class LocalPool(measure.Pool):
    def __init__(self, problem: Problem) -> None:
        self.worker: Any = LocalWorker(problem)
        self.workers = {}

    def __getitem__(self, home: contenders.Home) -> Any:
        return self.worker


def contender(name: str, result: Callable[[Array], Array]) -> Contender:
    def make(x: Array) -> dict[str, Pass]:
        return {"forward": Pass(lambda: result(x), lambda: [result(x)])}

    return Contender(name, "ours", "ours", make)


def double(x: Array) -> Array:
    return 2 * x


def not_a_number(x: Array) -> Array:
    return np.full_like(x, np.nan)


def one_wrong(x: Array) -> Array:
    y = 2 * x
    y[3] += 1  # 1e-3 of the whole
    return y


def broken(x: Array) -> Array:
    return x * (1 / 0)


def test_only_what_agrees_with_the_oracle_is_timed() -> None:
    functions = (double, not_a_number, one_wrong, broken)
    problem = Problem(
        "group",
        "doubling",
        {"forward": 1e-4},
        lambda: np.arange(1, 100, dtype=np.float32),
        lambda x: [2 * x.astype(np.float64)],
        [contender(function.__name__, function) for function in functions],
    )
    rows = measure.Measurement(problem, LocalPool(problem), None, rounds=2, budget=1).rows()
    right, nan, wrong, failed = rows
    assert len(right.values) == 2 and not right.wrong and right.error == 0
    assert nan.wrong and not nan.values and nan.error is not None and math.isnan(nan.error)
    assert wrong.wrong and not wrong.values
    assert failed.failed and not failed.values
    # ... and the report says so.
    text = report.details(rows)
    for row in (nan, wrong, failed):
        assert report.sentence(row) in text


def test_what_needed_no_memory_has_no_ratio() -> None:
    """Arrays of kilobytes, which fit pages that the process had: a peak of zero bytes."""

    def row(kind: Kind, peak: float) -> Row:
        return Row("memory", "heads", "training", "ops", kind, "bytes", 1, 1e-4, None, [peak])

    some, none = row("ours", 2.0**20), row("ours", 0.0)
    assert "| 1 MiB, ops | – | – | – | – |" in report.summary([some, row("floor", 0.0)])
    assert "| 1 MiB | – |" in report.details([some, row("floor", 0.0)])
    assert "| 1 MiB | 0 MiB | 0 |" in report.comparison([some, row("base", 0.0)])
    assert "| 0 MiB | 1 MiB | – |" in report.comparison([none, row("base", 2.0**20)])


# ---- Another revision, which lacks what is measured ----------------------------------------------


class OldTransformer(torch.nn.Module):
    def __init__(self, dim: int, num_tokens: int, depth: int, post_ln_norm: bool = False) -> None:
        super().__init__()


def test_an_option_that_a_revision_lacks_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(Transformer=OldTransformer, fuse=lambda module: module)
    monkeypatch.setattr(model, "our_package", lambda: package)
    model.ours(**model.QUICK.options)
    for make in (model.ours, model.ours_fused):
        with pytest.raises(AbsentError, match="this revision has no checkpoint_blocks"):
            make(**model.QUICK.options, checkpoint_blocks=True)
    with pytest.raises(AbsentError, match="no gate, normalize_input, transition_bias, simple_gate"):
        model.ours(**model.SMALL.options)


def test_a_flag_that_a_revision_lacks_is_absent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = tmp_path / "gateloop"
    old.write_text("#!/bin/sh\necho 'gateloop: no flag --dtype' >&2\nexit 2\n", encoding="utf-8")
    old.chmod(0o755)
    monkeypatch.setenv("GATELOOP_PROGRAM", str(old))
    with pytest.raises(AbsentError, match="refuses the command: gateloop: no flag --dtype"):
        program.train(b"text", ["--dtype", "bfloat16"], 1, tmp_path)
    monkeypatch.setenv("GATELOOP_PROGRAM", str(tmp_path / "none"))
    with pytest.raises(AbsentError, match="not built"):
        program.train(b"text", [], 1, tmp_path)


def test_a_revision_is_built_as_far_as_it_goes(tmp_path: Path) -> None:
    rules = "rule link\n  command = true\n"
    libraries = "build lib.so: link\nbuild gateloop_ops: phony lib.so\n"
    (tmp_path / "build.ninja").write_text(rules + libraries, encoding="utf-8")
    assert base.targets(tmp_path) == ["gateloop_ops"]
    more = "build gateloop: link\nbuild gateloop_runtime_static: phony lib.so\n"
    (tmp_path / "build.ninja").write_text(rules + libraries + more, encoding="utf-8")
    assert base.targets(tmp_path) == ["gateloop_ops", "gateloop"]


def test_error_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="shape"):
        contenders.error([np.zeros(3)], [np.ones(4)])
    with pytest.raises(ValueError, match="2 arrays"):
        contenders.error([np.zeros(3)] * 2, [np.ones(3)])


def test_contenders_take_turns() -> None:
    calls = []

    def taker(name: str) -> Callable[[], int]:
        def take() -> int:
            calls.append(name)
            return len(calls)

        return take

    values = timing.interleave({"a": taker("a"), "b": taker("b")}, rounds=3, budget=1e9)
    assert calls == ["a", "b"] * 3
    assert values == {"a": [1, 3, 5], "b": [2, 4, 6]}
    calls.clear()
    timing.interleave({"a": taker("a")}, rounds=5, budget=0)
    assert len(calls) == 2  # a median of at least two, however long they took


def test_the_oracle_of_the_quick_preset_is_the_models() -> None:
    torch.manual_seed(0)
    data = model.inputs(model.SMALL_QUICK, batch=2, length=33)
    ours = model.build(model.ours, model.SMALL_QUICK, data).double()
    weights = {name: w.double() for name, w in data.weights.items()}
    torch.testing.assert_close(ours(data.ids), oracle.transformer(weights, data.ids))


def test_a_text_is_right_only_if_its_bytes_are_the_likeliest() -> None:
    data = model.inputs(model.QUICK, batch=1, length=16)
    weights = {name: w.double() for name, w in data.weights.items()}
    text = data.ids
    for _ in range(4):
        text = torch.cat([text, oracle.transformer(weights, text)[:, -1:].argmax(-1)], 1)
    right = text[:, 16:]
    assert generation.regret(data, right) == 0
    for place in range(4):
        wrong = right.clone()
        wrong[0, place] = (wrong[0, place] + 1) % 256
        assert generation.regret(data, wrong) > generation.TOLERANCES["bfloat16"]


def test_a_wrong_kernel_stops_the_benchmark(tmp_path: Path) -> None:
    right = {"name": "Op/1x2x3/iterations:15", "ms": 1.5, "ratio": 1.1, "speedup": 1.9}
    wrong = {"name": "Other/1x2x3", "error_occurred": True, "error_message": "differs"}
    file = tmp_path / "kernels.json"
    file.write_text(json.dumps({"benchmarks": [right]}), encoding="utf-8")
    assert kernels.parse(file) == [kernels.Kernel("Op/1x2x3", 1.5, 1.1, 1.9)]
    file.write_text(json.dumps({"benchmarks": [right, wrong]}), encoding="utf-8")
    with pytest.raises(RuntimeError, match="Other/1x2x3: differs"):
        kernels.parse(file)


def test_documents_show_the_results() -> None:
    """`python -m benchmarks.report` has been run after the last measurement."""
    for document, text in report.documents(ROOT).items():
        assert document.read_text(encoding="utf-8") == text, (
            f"{document}: run 'python -m benchmarks.report'"
        )


def test_the_benchmark_of_gpus_runs_without_one(build_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    environment = os.environ | {
        "GATELOOP_OPS_LIBRARY": str(build_dir / "lib" / "libgateloop_ops.so"),
        "PYTHONPATH": str(ROOT / "python"),
    }
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    command += ["--out", str(file)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=120)
    results = json.loads(file.read_text(encoding="utf-8"))
    assert results["card"] == "CPU"
    contenders = {(row["problem"].split(" (")[0], row["contender"]) for row in results["rows"]}
    for op in ("linear", "polar", "simple"):
        for way in ("forward", "backward"):
            assert (f"{op} {way} bfloat16", "ours") in contenders
    for peer in ("reference", "torch associative_scan"):
        assert ("real scan float32", peer) in contenders
    assert ("training step float32", "reference") in contenders
    assert all(row["milliseconds"] > 0 for row in results["rows"])
