"""Derivatives in forward mode and under torch.func's transforms, of every operator."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from conftest import thinned
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from gateloop_cpp import Transformer, ops

REAL, COMPLEX = torch.float64, torch.complex128
CUTS = torch.tensor([0, 3, 3, 7])
MASK = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
FORMS = ("scan", "attention", "recurrent")

Operator = Callable[..., tuple[Tensor, Tensor]]
linear_recurrence: Operator = ops.linear_recurrence
gate_loop: Operator = ops.gate_loop
gate_loop_step: Operator = ops.gate_loop_step
polar_gate_loop: Operator = ops.polar_gate_loop
simple_gate_loop: Operator = ops.simple_gate_loop


def drawn(*sizes: int, dtype: torch.dtype = REAL, scale: float = 1) -> Tensor:
    return (torch.randn(*sizes, dtype=dtype) * scale).requires_grad_()


def jvp(
    function: Operator, inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    results, found = torch.func.jvp(function, inputs, tangents)[:2]
    return results, found


def transitions(*sizes: int, dtype: torch.dtype) -> Tensor:
    """Of magnitudes up to about 1, with an exact zero."""
    a = torch.randn(*sizes, dtype=dtype) * 0.5
    a[0, 1] = 0
    return a.requires_grad_()


def assert_both_modes(function: Operator, inputs: tuple[Tensor, ...]) -> None:
    assert gradcheck(function, inputs, check_forward_ad=True, check_backward_ad=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
class TestForwardMode:
    def test_linear_recurrence(self, dtype: torch.dtype, reverse: bool) -> None:
        a, x = transitions(2, 5, 3, dtype=dtype), drawn(2, 5, 3, dtype=dtype)
        state = drawn(2, 3, dtype=dtype)
        assert_both_modes(lambda *t: linear_recurrence(*t, reverse), (a, x, state))
        assert_both_modes(lambda *t: linear_recurrence(*t, reverse=reverse), (a, x))

    def test_packed_linear_recurrence(self, dtype: torch.dtype, reverse: bool) -> None:
        a, x = transitions(1, 7, 3, dtype=dtype), drawn(1, 7, 3, dtype=dtype)
        state = drawn(3, 3, dtype=dtype)
        assert_both_modes(lambda *t: linear_recurrence(*t, reverse, CUTS), (a, x, state))

    @pytest.mark.parametrize("form", thinned(["scan", "auto", "attention", "recurrent"], 2))
    def test_gate_loop(self, dtype: torch.dtype, reverse: bool, form: str) -> None:
        q, k, v = drawn(2, 5, 2, 3), drawn(2, 5, 2, 3), drawn(2, 5, 2, 4)
        a, state = transitions(2, 5, 2, dtype=dtype), drawn(2, 2, 3, 4, dtype=dtype)

        def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
            return gate_loop(*tensors, reverse=reverse, form=form)

        assert_both_modes(function, (q, k, v, a, state))

    def test_gate_loop_of_max_heads(self, dtype: torch.dtype, reverse: bool) -> None:
        q, k, v = drawn(2, 5, 3), drawn(2, 5, 3), drawn(2, 5, 3)
        a = transitions(2, 5, 3, dtype=dtype)
        assert_both_modes(lambda *t: gate_loop(*t, reverse=reverse), (q, k, v, a))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", ["per key", "packed per key", "taylor", "masked"])
def test_both_modes_of_options_of_gate_loop(how: str, form: str) -> None:
    batch, time = (1, 7) if how == "packed per key" else (2, 5)
    q, k, v = (drawn(batch, time, 1, 2) for _ in range(3))
    a = transitions(batch, time, 1, *([2] if "per key" in how else []), dtype=COMPLEX)
    states = len(CUTS) - 1 if how == "packed per key" else batch
    state = drawn(states, 1, 6 if how == "taylor" else 2, 2, dtype=COMPLEX)
    options: dict[str, dict[str, Any]] = {
        "packed per key": {"cu_seqlens": CUTS, "reverse": True},
        "taylor": {"feature_map": "taylor"},
        "masked": {"mask": MASK, "reverse": True},
    }
    function = partial(gate_loop, form=form, **options.get(how, {}))
    assert_both_modes(function, (q, k, v, a, state))


@pytest.mark.parametrize("reverse", [False, True])
def test_forward_mode_of_fused_gates(reverse: bool) -> None:
    q, k, v, z = drawn(2, 5, 3), drawn(2, 5, 3), drawn(2, 5, 3), drawn(2, 5, 6)
    state = drawn(2, 3, dtype=COMPLEX)
    assert_both_modes(lambda *t: polar_gate_loop(*t, reverse), (q, k, v, z, state))
    z, state = drawn(2, 5, 3), drawn(2, 3)
    assert_both_modes(lambda *t: simple_gate_loop(*t, reverse), (q, k, z, state))
    assert_both_modes(lambda *t: simple_gate_loop(*t, normalize_input=True), (q, k, z, state))


@pytest.mark.parametrize("dtype", [REAL, COMPLEX])
def test_both_modes_of_a_step(dtype: torch.dtype) -> None:
    q, k, v, state = drawn(2, 2, 3), drawn(2, 2, 3), drawn(2, 2, 4), drawn(2, 2, 3, 4, dtype=dtype)
    inputs = (q, k, v, transitions(2, 2, dtype=dtype), state)
    assert_both_modes(gate_loop_step, inputs)
    assert gradgradcheck(gate_loop_step, inputs)


def test_forward_mode_of_no_steps() -> None:
    a, x, state = drawn(2, 0, 3), drawn(2, 0, 3), drawn(2, 3)
    tangents = tuple(map(torch.ones_like, (a, x, state)))
    inputs = tuple(t.detach() for t in (a, x, state))
    dh, dstate = jvp(linear_recurrence, inputs, tangents)[1]
    assert dh.shape == (2, 0, 3)
    assert torch.equal(dstate, tangents[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_mode_keeps_dtypes(dtype: torch.dtype) -> None:
    q, k, v = (drawn(2, 9, 3).detach().to(dtype) for _ in range(3))
    z = drawn(2, 9, 6).detach().to(dtype)
    inputs = (q, k, v, z)
    results, tangents = jvp(polar_gate_loop, inputs, inputs)
    wide = tuple(t.double() for t in inputs)
    expected = jvp(polar_gate_loop, wide, wide)[1]
    assert [t.dtype for t in tangents] == [t.dtype for t in results]
    # The output is rounded to 8 or 11 bits, beside what the definition loses on its way.
    torch.testing.assert_close(tangents[0].double(), expected[0], rtol=0.03, atol=0.03)


CASES: dict[str, tuple[Operator, list[tuple[int, ...]]]] = {
    "linear_recurrence": (linear_recurrence, [(2, 5, 3), (2, 5, 3), (2, 3)]),
    "polar_gate_loop": (polar_gate_loop, [(2, 5, 3), (2, 5, 3), (2, 5, 3), (2, 5, 6)]),
    "simple_gate_loop": (simple_gate_loop, [(2, 5, 3), (2, 5, 3), (2, 5, 3), (2, 3)]),
    "gate_loop": (gate_loop, [(2, 5, 2, 3), (2, 5, 2, 3), (2, 5, 2, 4), (2, 5, 2)]),
    "gate_loop of max heads": (gate_loop, [(2, 5, 3)] * 4),
    "packed linear_recurrence": (
        partial(linear_recurrence, cu_seqlens=CUTS),
        [(1, 7, 3), (1, 7, 3), (3, 3)],
    ),
    "packed polar_gate_loop": (
        partial(polar_gate_loop, cu_seqlens=CUTS),
        [(1, 7, 3), (1, 7, 3), (1, 7, 3), (1, 7, 6)],
    ),
    "packed simple_gate_loop": (
        partial(simple_gate_loop, cu_seqlens=CUTS),
        [(1, 7, 3), (1, 7, 3), (1, 7, 3), (3, 3)],
    ),
    **{
        f"packed gate_loop, {form}": (
            partial(gate_loop, cu_seqlens=CUTS, form=form),
            [(1, 7, 2, 3), (1, 7, 2, 3), (1, 7, 2, 4), (1, 7, 2)],
        )
        for form in FORMS
    },
    **{
        f"gate_loop per key, {form}": (
            partial(gate_loop, form=form),
            [(2, 5, 2, 3), (2, 5, 2, 3), (2, 5, 2, 4), (2, 5, 2, 3)],
        )
        for form in FORMS
    },
    **{
        f"gate_loop of the Taylor map, {form}": (
            partial(gate_loop, form=form, feature_map="taylor"),
            [(2, 4, 1, 2), (2, 4, 1, 2), (2, 4, 1, 3), (2, 4, 1), (2, 1, 6, 3)],
        )
        for form in FORMS
    },
    **{
        f"masked gate_loop, {form}": (
            partial(gate_loop, mask=MASK, form=form),
            [(2, 5, 2, 3), (2, 5, 2, 3), (2, 5, 2, 4), (2, 5, 2)],
        )
        for form in FORMS
    },
    "gate_loop_step": (
        gate_loop_step,
        [(2, 2, 3), (2, 2, 3), (2, 2, 4), (2, 2), (2, 2, 3, 4)],
    ),
}


@pytest.fixture(params=CASES)
def scalar(request: pytest.FixtureRequest) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A number computed by an operator, no linear one, and inputs."""
    operator, shapes = CASES[request.param]
    inputs = [torch.randn(*shape, dtype=REAL) * 0.5 for shape in shapes]

    def value(*tensors: Tensor) -> Tensor:
        y, state = operator(*tensors)
        return y.square().sum() + state.abs().square().sum()

    return value, inputs


def test_torch_func_gradients(scalar: tuple[Callable[..., Tensor], list[Tensor]]) -> None:
    value, inputs = scalar
    leaves = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(value(*leaves), leaves)
    found = torch.func.grad(value, argnums=tuple(range(len(inputs))))(*inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_hessians(scalar: tuple[Callable[..., Tensor], list[Tensor]]) -> None:
    """Forward over reverse and reverse over reverse, with vmap over the directions."""
    value, inputs = scalar

    def of_last(last: Tensor) -> Tensor:
        return value(*inputs[:-1], last)

    expected = torch.autograd.functional.hessian(of_last, inputs[-1])
    for derivative in (torch.func.jacfwd, torch.func.jacrev):
        found = derivative(torch.func.grad(of_last))(inputs[-1])
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_gradients_of_each_row(scalar: tuple[Callable[..., Tensor], list[Tensor]]) -> None:
    value, inputs = scalar
    rows = [torch.stack((t, 2 * t)) for t in inputs]
    found = torch.func.vmap(torch.func.grad(value))(*rows)
    for i in range(2):
        expected = torch.func.grad(value)(*(t[i] for t in rows))
        torch.testing.assert_close(found[i], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", [n for n in CASES if "gate_loop" in n])
def test_gradients_of_a_batch_of_directions(name: str) -> None:
    operator, shapes = CASES[name]
    inputs = [drawn(*shape, scale=0.5) for shape in shapes]
    y = operator(*inputs)[0]
    directions = torch.randn(3, *y.shape, dtype=y.dtype)
    gradients = partial(torch.autograd.grad, y, inputs, retain_graph=True)
    found = gradients(directions, is_grads_batched=True)
    for ours, *theirs in zip(found, *map(gradients, directions), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("option", ["cu_seqlens", "mask"])
def test_vmap_over_cuts_and_masks(option: str, form: str) -> None:
    values = {
        "cu_seqlens": torch.tensor([[0, 3, 9], [0, 0, 9]]),
        "mask": torch.rand(2, 1, 9) < 0.5,
    }[option]
    q, k, v = torch.randn(3, 2, 1, 9, 2, 3, dtype=REAL)
    a = torch.randn(2, 1, 9, 2, dtype=COMPLEX) * 0.5

    def one(value: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        return gate_loop(*tensors, form=form, **{option: value})

    mapped = torch.vmap(one)(values, q, k, v, a)
    for i in range(2):
        expected = one(values[i], q[i], k[i], v[i], a[i])
        torch.testing.assert_close(tuple(t[i] for t in mapped), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_forward_mode_of_a_model_is_the_adjoint_of_its_backward(fraction: float) -> None:
    model = Transformer(8, num_tokens=5, depth=2, frac_gradient_state_transition=fraction)
    model = model.double()
    ids = torch.randint(5, (2, 6))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def logits(weights: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(model, weights, (ids,))
        return found

    y, dy = torch.func.jvp(logits, (parameters,), (tangents,))[:2]
    with torch.no_grad():
        torch.testing.assert_close(torch.func.jvp(logits, (parameters,), (tangents,))[1], dy)
    weight = torch.randn_like(y)
    (gradient,) = torch.func.vjp(logits, parameters)[1](weight)
    along = sum((gradient[name] * tangents[name]).sum() for name in parameters)
    torch.testing.assert_close((weight * dy).sum(), along)
