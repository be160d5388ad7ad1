"""The kernels on CUDA: values, bits, streams, graphs. What any device must give: on_device.py."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from channels import channel_errors, sizes
from test_ops import CASES, Case, call, inputs
from torch import Tensor

import gateloop_cpp
from gateloop_cpp.ops import gate_loop

if not torch.cuda.is_available():
    pytest.skip("torch finds no CUDA device", allow_module_level=True)

Ops = Any  # torch.ops.gateloop
SCANS = ("linear_recurrence", "polar_gate_loop", "simple_gate_loop")
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
C64, C128 = torch.complex64, torch.complex128
# Of the size of a channel. The state is float32 or wider; what is stored is rounded. The kernels of
# the CPU are within 1.5e-6, 9e-4 and 7e-3 of float64 in float32, float16 and bfloat16: two devices
# are at most twice that apart, and twice again is allowed.
ALLOWED = {F64: 1e-13, C128: 1e-13, F32: 6e-6, C64: 6e-6, F16: 4e-3, BF16: 3e-2}
# Around the rows of threads and chunks of 32 to 256 steps, and around tiles of 32 to 64 channels.
SHAPES = [(2, 1, 1), (2, 2, 33), (1, 63, 31), (2, 64, 32), (3, 65, 70), (1, 127, 64), (2, 129, 2)]
SHAPES += [(1, 256, 512), (2, 1000, 37), (1, 4099, 64)]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    for name in SCANS:
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"gateloop::{name}", "CUDA")
        assert has, f"this library has no CUDA kernel of {name}"


def case_of(op: str, dtype: torch.dtype, reverse: bool = False) -> Case:
    options = {"reverse": reverse}
    if op == "simple_gate_loop":
        options["normalize_input"] = reverse
    return Case(op, dtype, options, with_state=True)


def typed(case: Case, shape: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Arguments of any dtype; states in float32 or complex64 beside sequences of 16 bits."""
    wide = case._replace(dtype=C128 if case.dtype.is_complex else F64)
    *sequences, state = inputs(wide, *shape)
    narrow = F32 if case.dtype in (BF16, F16) else case.dtype
    state_dtype = narrow.to_complex() if state.is_complex() else narrow
    return (*(s.to(case.dtype) for s in sequences), state.to(state_dtype))


def results(ops: Ops, case: Case, arguments: tuple[Tensor, ...], device: str) -> list[Tensor]:
    """Both outputs, and the gradient of each argument."""
    leaves = [t.detach().to(device).requires_grad_() for t in arguments]
    outputs = call(ops, case, tuple(leaves))
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype).to(device) for o in outputs]
    found = [*outputs, *torch.autograd.grad(outputs, leaves, weights)]
    return [t.detach().cpu() for t in found]


def distance(ours: Tensor, theirs: Tensor) -> float:
    """Of the channel that is furthest off. One of few numbers, as of a state, may have cancelled:
    it counts as a sixteenth of the largest."""
    least = float(sizes(theirs).max()) / 16
    return float(channel_errors(ours, theirs, least=least).max())


TYPED = [(op, d) for op in SCANS for d in (F64, F32, BF16, F16)]
TYPED += [("linear_recurrence", C64), ("linear_recurrence", C128)]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("op", "dtype"), TYPED, ids=str)
def test_values_and_gradients_are_those_of_the_cpu(
    ops: Ops, op: str, dtype: torch.dtype, reverse: bool
) -> None:
    for shape in SHAPES:
        case = case_of(op, dtype, reverse)
        arguments = typed(case, shape)
        there, here = (results(ops, case, arguments, device) for device in ("cuda", "cpu"))
        for i, (ours, theirs) in enumerate(zip(there, here, strict=True)):
            assert distance(ours, theirs) <= ALLOWED[dtype], (shape, i)


@pytest.mark.parametrize("op", SCANS)
def test_shapes_without_numbers(ops: Ops, op: str) -> None:
    for shape in ((2, 0, 3), (0, 5, 3), (2, 5, 0)):
        arguments = tuple(t.cuda() for t in typed(case_of(op, F32), shape))
        y, final = call(ops, case_of(op, F32), arguments)
        assert y.shape == shape
        if shape[1] == 0:
            assert torch.equal(final, arguments[-1])


@pytest.mark.parametrize(("op", "dtype"), TYPED, ids=str)
def test_strides(ops: Ops, op: str, dtype: torch.dtype) -> None:
    case = case_of(op, dtype)
    plain = typed(case, (4, 300, 66))

    def strided(t: Tensor) -> Tensor:
        """The same numbers among others, at an address that fits no vector."""
        width = t.shape[-1] + 3
        among = torch.full((*t.shape[1::-1], width), 9, dtype=t.dtype, device="cuda")
        view = among.transpose(0, 1)[..., 1 : 1 + t.shape[-1]]
        return view.copy_(t)

    expected = results(ops, case, plain, "cuda")
    *sequences, state = plain
    leaves = [strided(t).requires_grad_() for t in sequences]
    outputs = call(ops, case, (*leaves, state.cuda()))
    for ours, theirs in zip(outputs, expected[:2], strict=True):
        assert torch.equal(ours.detach().cpu(), theirs)


@pytest.mark.parametrize(("op", "dtype"), TYPED, ids=str)
def test_packed_sequences_get_the_bits_that_they_get_alone(
    ops: Ops, op: str, dtype: torch.dtype
) -> None:
    cuts = [0, 1, 1, 130, 700, 957, 1500]
    count = len(cuts) - 1
    for reverse in (False, True):
        case = case_of(op, dtype, reverse)
        *sequences, _ = (t.cuda() for t in typed(case, (1, cuts[-1], 40)))
        state = typed(case, (count, 1, 40))[-1].cuda()
        packed = getattr(ops, op)
        for offsets in (torch.tensor(cuts), torch.tensor(cuts, device="cuda", dtype=torch.int32)):
            leaves = [t.clone().requires_grad_() for t in (*sequences, state)]
            outputs = packed(*leaves, **case.options, cu_seqlens=offsets)
            gradients = torch.autograd.grad([o.abs().sum() for o in outputs], leaves)
            for n, (begin, end) in enumerate(itertools.pairwise(cuts)):
                alone = [t[:, begin:end].clone().requires_grad_() for t in sequences]
                alone.append(state[n : n + 1].clone().requires_grad_())
                y, final = call(ops, case, tuple(alone))
                assert torch.equal(outputs[0][:, begin:end], y)
                assert torch.equal(outputs[1][n : n + 1], final)
                wanted = torch.autograd.grad([y.abs().sum(), final.abs().sum()], alone)
                for whole, part in zip(gradients[:-1], wanted[:-1], strict=True):
                    assert torch.equal(whole[:, begin:end], part)
                assert torch.equal(gradients[-1][n : n + 1], wanted[-1])


@pytest.mark.parametrize("op", SCANS)
def test_the_same_bits_beside_other_work(ops: Ops, op: str) -> None:
    case = case_of(op, F32)
    arguments = typed(case, (1, 20_000, 96))
    expected = results(ops, case, arguments, "cuda")
    noise, other = torch.randn(2048, 2048, device="cuda"), torch.cuda.Stream()
    for _ in range(20):
        with torch.cuda.stream(other):
            for _ in range(10):
                noise = torch.tanh(noise @ noise)
        for ours, theirs in zip(results(ops, case, arguments, "cuda"), expected, strict=True):
            assert torch.equal(ours, theirs)


def test_a_long_sequence(ops: Ops) -> None:
    case = case_of("linear_recurrence", F64)
    arguments = typed(case, (1, 262_144, 8))
    there, here = (results(ops, case, arguments, device) for device in ("cuda", "cpu"))
    for ours, theirs in zip(there, here, strict=True):
        assert distance(ours, theirs) <= ALLOWED[F64]


@pytest.mark.parametrize("time", [1, 300])
@pytest.mark.parametrize("op", SCANS)
def test_a_graph_replays_a_pass_with_other_numbers(ops: Ops, op: str, time: int) -> None:
    case = case_of(op, F32)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # all of it: autograd runs a node on the stream of its forward
        first, second = (tuple(t.cuda() * s for t in typed(case, (2, time, 64))) for s in (1, 0.5))
        static = [t.clone().requires_grad_() for t in first]

        def run() -> list[Tensor]:
            outputs = call(ops, case, tuple(static))
            return [*outputs, *torch.autograd.grad([o.abs().sum() for o in outputs], static)]

        for _ in range(3):
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            captured = run()
        for given in (second, first):
            with torch.no_grad():
                for place, numbers in zip(static, given, strict=True):
                    place.copy_(numbers)
            graph.replay()
            again = [t.clone() for t in captured]
            for ours, theirs in zip(again, run(), strict=True):
                assert torch.equal(ours, theirs)


def test_streams(ops: Ops) -> None:
    case = case_of("polar_gate_loop", F32)
    arguments = tuple(t.cuda() for t in typed(case, (2, 2000, 64)))
    expected = call(ops, case, arguments)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        ours = call(ops, case, arguments)[0] * 1
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(ops: Ops, case: Case) -> None:
    arguments = tuple(t.cuda().requires_grad_() for t in inputs(case, 2, 37, 3))
    torch.library.opcheck(getattr(ops, case.op).default, arguments, case.options)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_rms_norm(ops: Ops, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    for shape in (
        (0, 7),
        (3, 1),
        (5, 7),
        (2, 3, 33),
        (1, 512),
        (3000, 1536),
        (9, 4097),
        (2, 40_000),
    ):
        x, dy = (torch.randn(shape, generator=generator, dtype=F64).to(dtype) for _ in range(2))
        gamma = torch.randn(shape[-1], generator=generator, dtype=F64).to(dtype)
        found = []
        for device in ("cuda", "cuda", "cpu"):
            leaves = [t.to(device).requires_grad_() for t in (x, gamma)]
            y = ops.rms_norm(*leaves)
            found.append([y, *torch.autograd.grad(y, leaves, dy.to(device))])
        for i, (ours, again, theirs) in enumerate(zip(*found, strict=True)):
            assert torch.equal(ours, again)
            assert distance(ours.detach().cpu(), theirs.detach()) <= ALLOWED[dtype], (shape, i)


def test_wide_heads() -> None:
    q, k, v = (torch.randn(2, 200, 4, 64, dtype=F64) for _ in range(3))
    a = torch.rand(2, 200, 4, dtype=F64)
    here = gate_loop(q, k, v, a)
    there = gate_loop(q.cuda(), k.cuda(), v.cuda(), a.cuda())
    for ours, theirs in zip(there, here, strict=True):
        assert distance(ours.cpu(), theirs) <= 1e-12


def model() -> gateloop_cpp.Transformer:
    torch.manual_seed(0)
    return gateloop_cpp.Transformer(64, num_tokens=50, depth=2).cuda()


def test_autocast() -> None:
    ours = model()
    ids = torch.randint(50, (2, 100), device="cuda")
    full = ours(ids, return_loss=True)
    with torch.autocast("cuda", BF16):
        loss = ours(ids, return_loss=True)
    loss.backward()
    assert float((loss - full).detach().abs()) < 0.05
    gradients = [p.grad for p in ours.parameters() if p.grad is not None]
    assert gradients
    assert all(bool(g.isfinite().all()) for g in gradients)


# Inductor recommends less precise products.
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")
def test_compile() -> None:
    ours = model()
    ids = torch.randint(50, (2, 100), device="cuda")
    expected = ours(ids, return_loss=True)
    compiled = torch.compile(ours, fullgraph=False)(ids, return_loss=True)
    compiled.backward()
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)


def test_wrong_cuts_on_the_device_end_in_an_error() -> None:
    script = (
        "import torch, gateloop_cpp\n"
        "x = torch.rand(1, 9, 3, device='cuda')\n"
        "cuts = torch.tensor([0, 7, 4, 9], device='cuda')\n"
        "torch.ops.gateloop.linear_recurrence(x, x, cu_seqlens=cuts)\n"
        "torch.cuda.synchronize()\n"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(root / "python")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode != 0
    assert "assert" in result.stderr
