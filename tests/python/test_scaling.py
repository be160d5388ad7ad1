"""docs/scaling.md shows its record, formulas fit the counts, the simulation keeps its laws."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from benchmarks import scaling, scaling_counts
from benchmarks.scaling import FABRICS, OPTIONS, Fabric, Machine, Option
from processes_in_group import in_group
from torch._C import _distributed_c10d as c10d
from torch.profiler import ProfilerActivity, profile

from gateloop_cpp import Transformer
from gateloop_cpp.gate_looped_attention import Gate

PLAIN = OPTIONS[0]


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    return dict(json.loads(scaling.RECORD.read_text(encoding="utf-8")))


def test_the_document_shows_the_record(record: dict[str, Any]) -> None:
    text = scaling.DOCUMENT.read_text(encoding="utf-8")
    assert scaling.filled(text, record) == text, "run 'python -m benchmarks.scaling'"
    for fabric in FABRICS:  # given in a table of the text
        line = next(line for line in text.splitlines() if line.startswith(f"| {fabric.name} |"))
        assert f" {fabric.bandwidth / 1e9:g} GB/s | {fabric.latency * 1e6:g} µs" in line
    with pytest.raises(ValueError, match="<!-- counts: begin --> and"):
        scaling.filled(text.replace("<!-- counts: begin -->", ""), record)


def test_the_formulas_fit_the_counts(record: dict[str, Any]) -> None:
    assert [counts["processes"] for counts in record["counts"]] == [2, 3]
    for found in record["counts"]:
        for name, formula in scaling.expectations(record).items():
            # More by the headers of TCP (0.1 per cent of packets of 64 KiB) and of gloo.
            ratio = found["counts"][name]["bytes"] / formula(found["processes"])
            assert 1 < ratio < 1.02, name
        collectives = found["counts"]["data parallel step"]["collectives"]
        assert collectives == len(scaling.buckets(record["parameters"]))


def check_time_sharded_step() -> None:
    batch, dim, depth, processes = 3, 16, 2, 2
    bytes_of: dict[Gate, int] = {"polar": 8, "sigmoid": 4}  # a state's number
    for gate, number in bytes_of.items():
        model = Transformer(dim, num_tokens=256, depth=depth, gate=gate)
        step = scaling_counts.time_sharded_step(model, batch)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            step()
        sent = [(e.key, math.prod(e.input_shapes[0])) for e in seen.events() if "gloo:" in e.key]
        (_, tokens), (reduced, targets), *gathers = sent
        assert (8 * tokens, 8 * targets) == (scaling.first_tokens_bytes(batch), 8)
        assert reduced == "gloo:all_reduce"
        state = number * batch * dim
        # float32; each waits for P - 1 messages.
        expected = [("gloo:all_gather", n * state // 4) for n in (2, 2, 3, 3)]
        assert gathers == expected and len(gathers) == 2 * depth
        if gate == "polar":
            all_bytes = sum(scaling.all_gather_bytes(4 * n, processes) for _, n in gathers)
            all_bytes += scaling.all_gather_bytes(8 * tokens, processes)
            all_bytes += scaling.all_reduce_bytes(8 * targets, processes)
            assert all_bytes == scaling.time_sharded_bytes(batch, dim, depth, processes)


def test_a_time_sharded_step_sends_what_the_formula_says() -> None:
    in_group(2, check_time_sharded_step)


def test_buckets_are_those_of_c10d(record: dict[str, Any]) -> None:
    parameters = record["parameters"]
    tensors = [torch.empty(numel) for numel in reversed(parameters)]
    limits = [c10d._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]
    assert limits == [scaling.FIRST_BUCKET, scaling.BUCKET]
    theirs, _ = c10d._compute_bucket_assignment_by_size(tensors, limits)
    sizes = [sum(4 * tensors[i].numel() for i in bucket) for bucket in theirs]
    assert scaling.buckets(parameters) == sizes
    assert sum(sizes) == 4 * sum(parameters)


MACHINE = Machine("a machine", step=3.0, batch=4, host=0.0)
FABRIC = Fabric("a network", bandwidth=1e6, latency=1e-3)


def test_a_step_by_hand() -> None:
    """Two buckets, of 2 and 1 MB in backward order, on 2 processes: each message is half of one."""
    parameters = [250_000, 500_000]
    assert scaling.buckets(parameters) == [2_000_000, 1_000_000]
    # The first is full after 1 s forward and two thirds of 2 s backward. It takes 2 messages of
    # 1 ms + 1 s; the second was full meanwhile and takes 2 of 1 ms + 0.5 s.
    seconds = scaling.seconds(MACHINE, FABRIC, PLAIN, 2, parameters)
    assert seconds == pytest.approx(1 + 4 / 3 + 2.002 + 1.002)
    # ZeRO-1: one message more of 1 ms + 1.5 s.
    zero = scaling.seconds(MACHINE, FABRIC, Option("", zero=True), 2, parameters)
    assert zero == pytest.approx(seconds + 1.501)
    # In time: 6 layers, of 4 sequences of 512 channels 2 complex numbers forward and 3 back; for
    # the loss 5 int64, and twice half of one.
    shared = scaling.seconds(MACHINE, FABRIC, Option("", group=2), 2, parameters)
    gathers = 6 * (2e-3 + (16 + 24) * 4 * 512 / 1e6)
    loss = 3e-3 + (40 + 8) / 1e6
    assert shared == pytest.approx(seconds + gathers + loss)
    busy = dataclasses.replace(MACHINE, host=1e-6)  # twice the time a byte
    assert scaling.seconds(busy, FABRIC, PLAIN, 2, parameters) > seconds + 2.9


def test_one_process_and_a_perfect_network_cost_nothing(record: dict[str, Any]) -> None:
    perfect = Fabric("perfect", bandwidth=float("inf"), latency=0.0)
    for option in OPTIONS:
        for fabric, processes in ((FABRIC, 1), (perfect, 4096)):
            share = scaling.efficiency(MACHINE, fabric, option, processes, record["parameters"])
            assert share == pytest.approx(1)


def test_what_must_not_be_worse_is_not(record: dict[str, Any]) -> None:
    found = {
        (machine.name, fabric.name, option.name): values
        for machine, fabric, option, values in scaling.simulated(record)
    }
    for (machine, fabric, option), values in found.items():
        assert values == sorted(values, reverse=True)  # more processes
        plain = found[machine, fabric, PLAIN.name]
        better = option.startswith(("bfloat16", "batch"))
        for ours, theirs in zip(values, plain, strict=True):
            assert ours >= theirs if better else ours <= theirs, (machine, fabric, option)


def test_the_plot_is_drawn(record: dict[str, Any], tmp_path: Any) -> None:
    for name in ("one.svg", "two.svg"):
        scaling.draw(record, tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    text = scaling.PLOT.read_text(encoding="utf-8")
    drawn = (tmp_path / "one.svg").read_text(encoding="utf-8")
    # Curves are drawn from these numbers; letters depend on the machine's fonts.
    assert [line for line in drawn.splitlines() if line.startswith("L ")] == [
        line for line in text.splitlines() if line.startswith("L ")
    ]
