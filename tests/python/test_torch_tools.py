"""torch's own tools on the package: compile, export, autocast, func, copies, dtypes, meta."""

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import thinned
from torch import Tensor, nn

import gateloop_cpp
from gateloop_cpp import SimpleGateLoopLayer, Transformer
from gateloop_cpp.heinsen import heinsen_scan
from gateloop_cpp.ops import gate_loop, linear_recurrence, polar_gate_loop, simple_gate_loop

MODELS: dict[str, dict[str, Any]] = {
    "max_heads": {},
    "post_norm": dict(post_ln_norm=True, sub_ln=True),
    "wide_heads": dict(gate_loop_heads=4),
    "sigmoid": dict(gate="sigmoid", normalize_input=True, transition_bias=(-1.0, 5.0)),
    "attention": dict(use_gate_looped_attn=False, dim_head=8, heads=2, rotary_emb=True),
    "relative": dict(use_gate_looped_attn=False, dim_head=8, heads=2, data_dependent_rel_pos=True),
}
LAYERS: dict[str, dict[str, Any]] = {
    "fused": {},
    "reverse": dict(reverse=True, post_ln=True),
    "heinsen": dict(use_heinsen=True),
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def transformer(name: str) -> Transformer:
    return Transformer(16, num_tokens=32, depth=2, **MODELS[name])


def ids(time: int = 12) -> Tensor:
    return torch.randint(32, (2, time))


# ---- torch.compile -------------------------------------------------------------------------------


def assert_compiles(
    module: nn.Module, inputs: list[Tensor], backend: str = "inductor", **options: bool
) -> None:
    """One graph, forward and backward, for every length."""
    torch.compiler.reset()
    compiled = copy.deepcopy(module)
    compiled.compile(fullgraph=True, dynamic=True, backend=backend)
    for x in inputs:
        results = []
        for m in (module, compiled):
            m.zero_grad()
            y = m(x, **options)
            y.square().mean().backward()
            results.append([y, *(p.grad for p in m.parameters() if p.grad is not None)])
        for plain, ours in zip(*results, strict=True):
            # The compiler fuses and reorders float32 sums of some dozens of terms.
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", thinned(MODELS, 2))
def test_compile_transformer(name: str) -> None:
    # Both backends take the same whole graphs; the default one then compiles C++ for up to 30 s.
    backend = "inductor" if name == "max_heads" else "aot_eager"
    assert_compiles(transformer(name), [ids(12), ids(31), ids(7)], backend, return_loss=True)


# 12 steps are whole windows, 10 are not.
def test_compile_a_scaled_gradient() -> None:
    model = Transformer(8, num_tokens=5, depth=1, frac_gradient_state_transition=0.5)
    assert_compiles(model, [ids(13) % 5], "aot_eager", return_loss=True)


def test_compile_windows() -> None:
    model = Transformer(16, num_tokens=32, depth=1, layers="attention", dim_head=8, window=4)
    assert_compiles(model, [ids(13), ids(11)], "aot_eager", return_loss=True)


@pytest.mark.parametrize("name", LAYERS)
def test_compile_simple_gate_loop_layer(name: str) -> None:
    inputs = [torch.randn(2, time, 16) for time in (12, 31, 7)]
    assert_compiles(SimpleGateLoopLayer(16, **LAYERS[name]), inputs)


# ---- torch.export --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_export(name: str) -> None:
    model = transformer(name).eval()
    time = torch.export.Dim("time", min=2, max=1024)
    program = torch.export.export(model, (ids(),), dynamic_shapes=({1: time},))
    x = ids(33)
    torch.testing.assert_close(program.module()(x), model(x), rtol=1e-5, atol=1e-5)


# ---- Copies, dtypes, devices ---------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_pickle_and_deepcopy(name: str) -> None:
    model, x = transformer(name), ids()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "relative"])
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    model, x = transformer(name), ids()
    expected = model(x)
    logits = copy.deepcopy(model).to(dtype)(x)
    assert logits.dtype == dtype
    # Two layers of about ten roundings each of logits of order 1.
    tolerance = 20 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, dict(use_heinsen=True)], ids=["fused", "heinsen"])
def test_low_precision_layer(options: dict[str, bool], dtype: torch.dtype) -> None:
    layer = SimpleGateLoopLayer(16, **options)
    x = torch.randn(2, 50, 16)
    y, (a, kv) = copy.deepcopy(layer).to(dtype)(x.to(dtype), return_cache=True)
    assert (y.dtype, a.dtype, kv.dtype) == (dtype, torch.float32, torch.float32)
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rotary_positions_are_exact_in_low_precision(dtype: torch.dtype) -> None:
    """257 is no bfloat16, and a frequency rounded to one is multiplied by the position."""
    rotary = gateloop_cpp.CausalFullAttention(16, dim_head=8, heads=2, rotary_emb=True).rotary_emb
    assert rotary is not None
    t = torch.randn(1, 2, 3000, 8)
    expected = rotary(t)
    ours = copy.deepcopy(rotary).to(dtype)(t.to(dtype))
    assert ours.dtype == dtype
    # One rounding of values up to 5 before and one after.
    torch.testing.assert_close(ours.float(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    # Loading weights of the peer in this precision in place of ours too.
    assigned = copy.deepcopy(rotary).to(dtype)
    assigned.load_state_dict({"freqs": torch.ones(4, dtype=dtype)}, assign=True)
    turned = float(assigned(torch.ones(1, 1, 258, 8, dtype=dtype))[0, 0, 257, 0])
    expected_turn = math.cos(257) - math.sin(257)
    assert turned == pytest.approx(expected_turn, abs=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", MODELS)
def test_meta_device(name: str) -> None:
    with torch.device("meta"):
        model = transformer(name)
    assert model(ids().to("meta")).shape == (2, 12, 32)
    real = transformer(name)
    model.load_state_dict(real.state_dict(), assign=True)
    torch.testing.assert_close(model(ids(5)).shape, real(ids(5)).shape)


# ---- Autocast ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str) -> None:
    model, x = transformer(name), ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, cache = model(x, return_cache=True)
        loss = model(x, return_loss=True)
    assert logits.dtype == torch.bfloat16
    loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    if model.options["use_gate_looped_attn"]:
        wide = {torch.float32, torch.complex64}
        assert all(state.dtype in wide for state in cache)
    if name != "relative":  # its floor of 1e-10 magnifies every rounding
        atol = 20 * torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(logits.float(), model(x), rtol=0, atol=atol)


# ---- torch.func ----------------------------------------------------------------------------------


def sequence(width: int = 4) -> Tensor:
    return torch.randn(3, 2, 7, width, dtype=torch.float64)


def function_cases() -> dict[str, tuple[Callable[..., tuple[Tensor, Tensor]], list[Tensor]]]:
    torch.manual_seed(0)
    a = torch.polar(torch.rand(3, 2, 7, 4, dtype=torch.float64), sequence())
    return {
        "linear_recurrence": (linear_recurrence, [sequence().sigmoid(), sequence()]),
        "complex": (linear_recurrence, [a, sequence() + 0j]),
        "gate_loop": (gate_loop, [sequence(), sequence(), sequence(), a]),
        "polar_gate_loop": (polar_gate_loop, [sequence() for _ in range(3)] + [sequence(8)]),
        "simple_gate_loop": (simple_gate_loop, [sequence() for _ in range(3)]),
        "reverse": (partial(simple_gate_loop, reverse=True), [sequence() for _ in range(3)]),
    }


@pytest.mark.parametrize("name", function_cases())
def test_vmap(name: str) -> None:
    function, arguments = function_cases()[name]
    expected = [torch.stack(t) for t in zip(*map(function, *arguments), strict=True)]
    for place in (0, 1, -1):
        moved = [t.movedim(0, place) for t in arguments]
        for ours, plain in zip(torch.vmap(function, place)(*moved), expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=0, atol=0)


def test_vmap_over_one_argument_keeps_the_gradient() -> None:
    a, x = sequence()[0].sigmoid().requires_grad_(), sequence().requires_grad_()
    mapped = torch.vmap(linear_recurrence, (None, 0))(a, x)[0]
    plain = torch.stack([linear_recurrence(a, each)[0] for each in x])
    torch.testing.assert_close(mapped, plain, rtol=0, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(mapped.square().sum(), (a, x)),
        torch.autograd.grad(plain.square().sum(), (a, x)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


# ---- gradcheck and opcheck of what is written in Python ------------------------------------------


@pytest.mark.parametrize("name", function_cases())
def test_gradcheck_of_the_functions(name: str) -> None:
    function, arguments = function_cases()[name]
    leaves = tuple(t[0, :, :4].detach().requires_grad_() for t in arguments)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck_of_wide_heads(reverse: bool) -> None:
    q, k = torch.randn(2, 1, 4, 2, 3, dtype=torch.float64).requires_grad_().unbind()
    v = torch.randn(1, 4, 2, 2, dtype=torch.float64, requires_grad=True)
    a = torch.polar(torch.rand(1, 4, 2).double(), torch.randn(1, 4, 2).double()).requires_grad_()
    state = torch.randn(1, 2, 3, 2, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(partial(gate_loop, reverse=reverse), (q, k, v, a, state))


def test_gradcheck_of_heinsen() -> None:
    a = torch.rand(2, 6, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(heinsen_scan, (a, x))
    assert torch.autograd.gradgradcheck(heinsen_scan, (a, x))
