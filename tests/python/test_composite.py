"""The operators' definitions in torch's operators, for devices without kernels, beside the kernels.

test_ops, test_ragged_ops, test_gate_loop and others run on both; here they are compared.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import composite
import pytest
import torch
from channels import assert_near
from conftest import thinned
from test_gate_loop import drawn
from test_ops import CASES, Case, call, inputs, unequal_channels
from torch import Tensor
from watching import Watch

from gateloop_cpp import ops as _ops

ROOT = Path(__file__).resolve().parents[2]
Ops = Any  # torch.ops.gateloop
TIMES = [0, 1, 7, 16, 17, 64, 255, 1000]
F32, F64 = torch.float32, torch.float64
Function = Callable[..., tuple[Tensor, Tensor]]


def on_both(function: Function, arguments: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """Results and gradients of the kernels, then of the definitions."""

    def results() -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in arguments]
        outputs = function(*leaves)
        generator = torch.Generator().manual_seed(2)
        weights = [
            torch.randn(o.shape, dtype=F64, generator=generator).to(o.dtype) for o in outputs
        ]
        return (*outputs, *torch.autograd.grad(outputs, leaves, weights, materialize_grads=True))

    kernels = results()
    with composite.forced():
        return [kernels, results()]


def test_forced_calls_come_to_torchs_operators(ops: Ops) -> None:
    x = torch.rand(1, 64, 2)

    def made_of_others() -> bool:
        with torch.autograd.profiler.profile() as profile:
            ops.linear_recurrence(x, x)
        return any(event.name == "aten::addcmul" for event in profile.function_events)

    assert not made_of_others()
    with composite.forced():
        assert made_of_others()
    assert not made_of_others()
    assert {"linear_recurrence", "polar_gate_loop", "rms_norm"} < set(composite.operators())


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_kernels(ops: Ops, case: Case, time: int) -> None:
    arguments = unequal_channels(inputs(case, 2, time, 3))
    kernels, definitions = on_both(lambda *a: call(ops, case, a), arguments)
    for ours, theirs in zip(definitions, kernels, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        if theirs.numel() > 0:
            assert_near(ours, theirs, 1e-10)


@pytest.mark.parametrize("case", [*CASES, None], ids=str)
def test_a_dispatch_mode_may_watch(ops: Ops, case: Case | None) -> None:
    """Below the mode, kernels run without the dispatch keys that resolve conjugates."""
    heads: Any = _ops.gate_loop  # where there is no case
    arguments = inputs(case, 2, 70, 3) if case else drawn((2, 70, 2, 3, 4), True, per_key=True)

    def results() -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in arguments]
        outputs = call(ops, case, tuple(leaves)) if case else heads(*leaves)
        weights = [torch.ones_like(o) * (2 - 1j if o.is_complex() else 2) for o in outputs]
        return (*outputs, *torch.autograd.grad(outputs, leaves, weights))

    with composite.forced():
        expected = results()
        with Watch():
            watched = results()
    for ours, theirs in zip(watched, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# What the arithmetic of a thousand steps loses at most, of the largest number of a channel: in
# float32 by sums in another order; elsewhere a unit in the last place, rounded from float32 states.
LOSSES = {F32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", LOSSES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if not c.dtype.is_complex], ids=str)
def test_equals_the_kernels_in_low_precision(ops: Ops, case: Case, dtype: torch.dtype) -> None:
    exact = inputs(case, 2, 255, 3)
    state = torch.complex64 if case.op == "polar_gate_loop" else F32
    arguments = tuple(t.to(dtype if t.ndim == 3 else state) for t in exact)
    kernels, definitions = on_both(lambda *a: call(ops, case, a), arguments)
    for ours, theirs in zip(definitions, kernels, strict=True):
        assert ours.dtype == theirs.dtype
        wide = torch.complex128 if ours.is_complex() else F64
        assert_near(ours.to(wide), theirs, LOSSES[dtype])


@pytest.mark.parametrize("modulus", [0.0, 1.0, 0.999, None], ids=str)
@pytest.mark.parametrize("dtype", [F64, torch.complex128], ids=str)
def test_transitions_of_zero_and_one_are_no_special_case(
    ops: Ops, dtype: torch.dtype, modulus: float | None
) -> None:
    torch.manual_seed(3)
    a = torch.rand(2, 1000, 3, dtype=F64)
    if modulus is None:
        a[:, ::5], a[:, 1::3] = 0, 1
    else:
        a.fill_(modulus)
    x = torch.randn(2, 1000, 3, dtype=dtype)
    kernels, definitions = on_both(ops.linear_recurrence, (a.to(dtype), x))
    for ours, theirs in zip(definitions, kernels, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("time", TIMES)
def test_wide_heads_equal_the_kernels(
    time: int, is_complex: bool, per_key: bool, reverse: bool
) -> None:
    arguments = tuple(drawn((2, time, 2, 3, 4), is_complex, per_key=per_key))
    function: Any = _ops.gate_loop
    kernels, definitions = on_both(lambda *a: function(*a, reverse), arguments)
    for ours, theirs in zip(definitions, kernels, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("cuts", [[0, 0, 3, 67, 67, 200, 201, 201], [0, 2, 5, 9]], ids=str)
def test_packed_wide_heads_equal_the_kernels(
    cuts: list[int], is_complex: bool, per_key: bool, reverse: bool
) -> None:
    q, k, v, a, _ = drawn((1, cuts[-1], 2, 3, 4), is_complex, per_key=per_key)
    states = torch.randn(len(cuts) - 1, 2, 3, 4, dtype=a.dtype)
    function: Any = _ops.gate_loop
    kernels, definitions = on_both(
        lambda *t: function(*t, reverse, torch.tensor(cuts)), (q, k, v, a, states)
    )
    for ours, theirs in zip(definitions, kernels, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("reverse", [False, True])
def test_wide_heads_of_an_infinite_sequence_spoil_no_other(reverse: bool) -> None:
    function: Any = _ops.gate_loop
    cuts = torch.tensor([0, 40, 130, 170])
    generator = torch.Generator().manual_seed(3)
    arguments = drawn((1, 170, 2, 3, 4), True)[:4]
    weights = torch.randn(1, 170, 2, 4, dtype=F64, generator=generator)
    results = []
    for spoiled in (False, True):
        leaves = [t.clone() for t in arguments]
        if spoiled:
            for t in leaves:
                t[:, 40:130] = torch.inf
        leaves = [t.requires_grad_() for t in leaves]
        with composite.forced():
            y, final = function(*leaves, None, reverse, cuts)
            gradients = torch.autograd.grad(y, leaves, weights)
        assert not spoiled or not y.isfinite().all()
        results.append(
            [final[::2], *(t[:, [*range(40), *range(130, 170)]] for t in (y, *gradients))]
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", LOSSES, ids=str)
def test_wide_heads_equal_the_kernels_in_low_precision(dtype: torch.dtype) -> None:
    arguments = tuple(drawn((2, 255, 2, 16, 24), True, dtype))
    kernels, definitions = on_both(_ops.gate_loop, arguments)
    for ours, theirs in zip(definitions, kernels, strict=True):
        unit = torch.finfo(theirs.dtype).eps
        # Sums of float32 in another order; of a channel over time, or of a row of a state.
        every = tuple(range(theirs.ndim))
        channel = (0, *every[2:]) if theirs.shape[1] == 255 else (*every[:-2], every[-1])
        assert_near(ours, theirs, 1e-5, relative=unit, of=channel)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_long_packed_sequences_equal_the_kernels(ops: Ops, case: Case) -> None:
    cuts = torch.tensor([0, 0, 7, 23, 24, 279, 279, 1000])
    sequences = inputs(case, 1, 1000, 2)
    if case.with_state:
        sequences = (*sequences[:-1], inputs(case, len(cuts) - 1, 1, 2)[-1])
    operator = getattr(ops, case.op)
    kernels, definitions = on_both(
        lambda *a: operator(*a, cu_seqlens=cuts, **case.options), sequences
    )
    for ours, theirs in zip(definitions, kernels, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


# What the dispatcher calls for a device without kernels, reached here without such a device.
@pytest.mark.parametrize("key", ["CUDA", "MPS", "XPU", "PrivateUse1", "XLA"])
def test_every_device_without_kernels_has_the_definitions(ops: Ops, key: str) -> None:
    x = torch.rand(1, 40, 2)
    expected = ops.linear_recurrence(x, x)
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    found = ops.linear_recurrence.default.redispatch(keys, x, x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


STEP = """
import sys, torch
import composite
from gateloop_cpp import ops
from benchmarks import peer
from benchmarks.worker import peak_bytes
who, name = sys.argv[1:]
def polar(q, k, v, z):
    heads = [t.transpose(1, 2).flatten(0, 1).unsqueeze(-1) for t in (q, k, v)]
    raw = torch.view_as_complex(z.unflatten(2, (-1, 2)))
    a = (raw.abs().sigmoid() * raw / raw.abs()).transpose(1, 2).flatten(0, 1)
    return peer.gate_loop_operator(*heads, a[:, :, None, None]), None
def linear(a, x):
    return peer.associative_scan(peer.binary_operator, (a, x))[1], None
def simple(q, kv, z):
    return peer.simple_gate_loop_operator(q, kv, z.sigmoid())
theirs = {"linear_recurrence": linear, "simple_gate_loop": simple, "polar_gate_loop": polar}[name]
function = theirs if who == "theirs" else getattr(ops, name)
def step(time):
    count = {"linear_recurrence": 2, "simple_gate_loop": 3, "polar_gate_loop": 4}[name]
    inputs = [torch.rand(1, time, 512 if i < 3 else 1024, requires_grad=True) for i in range(count)]
    before = peak_bytes()
    function(*inputs)[0].sum().backward()
    return (peak_bytes() - before) / 2**20
with composite.forced():
    step(256)  # libraries are there before the measurement begins
    print(step(16384))
"""


def peak(who: str, name: str) -> float:
    """MiB above the inputs."""
    paths = (ROOT / "python", ROOT, ROOT / "tests" / "python")
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STEP, who, name],
        env=os.environ | {"PYTHONPATH": ":".join(map(str, paths))},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return float(result.stdout)


@pytest.mark.parametrize(
    "name", thinned(["polar_gate_loop", "linear_recurrence", "simple_gate_loop"], 3)
)
def test_16384_steps_take_less_memory_than_the_peers(name: str) -> None:
    ours, theirs = peak("ours", name), peak("theirs", name)
    print(f"ours {ours:.0f} MiB, the peer {theirs:.0f} MiB")
    assert ours <= 0.6 * theirs
