"""RMSNorm as an operator: its kernel, its definition, and torch's tools on both."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from channels import channel_errors, weight_errors
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from watching import Watch

from gateloop_cpp.rms_norm import RMSNorm

rms_norm = torch.ops.gateloop.rms_norm
ROWS = (2, 3, 40)
Input = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def definition(x: Tensor, gamma: Tensor) -> Tensor:
    floor = 2**-24 if x.dtype == torch.float16 else 1e-12
    return x / x.norm(dim=-1, keepdim=True).clamp_min(floor) * gamma * gamma.shape[0] ** 0.5


def inputs(dtype: torch.dtype = torch.float64, shape: tuple[int, ...] = ROWS) -> Input:
    x, gamma = torch.randn(shape), torch.randn(shape[-1])
    return x.to(dtype).requires_grad_(), gamma.to(dtype).requires_grad_()


def gradients(f: Callable[..., Tensor], of: Input, dy: Tensor, **options: bool) -> Input:
    dx, dgamma = torch.autograd.grad(f(*of), of, dy, **options)
    return dx, dgamma


def is_one_operator(y: Tensor) -> bool:
    assert y.grad_fn is not None
    return "RmsNorm" in y.grad_fn.name()


@pytest.mark.parametrize("shape", [ROWS, (40,), (0, 40), (5, 1), (300, 33)], ids=str)
def test_values_and_gradients_are_the_definitions(shape: tuple[int, ...]) -> None:
    of = inputs(shape=shape)
    y, dy = rms_norm(*of), torch.randn(shape, dtype=torch.float64)
    assert is_one_operator(y)
    torch.testing.assert_close(y, definition(*of), rtol=1e-13, atol=1e-13)
    expected = gradients(definition, of, dy)
    torch.testing.assert_close(gradients(rms_norm, of, dy), expected, rtol=1e-12, atol=1e-12)


def test_a_norm_below_the_floor_and_at_it() -> None:
    x, gamma = torch.randn(3, 1, dtype=torch.float64), torch.randn(1, dtype=torch.float64)
    x[1], x[2] = 1e-14, 1e-12
    of, dy = (x.requires_grad_(), gamma.requires_grad_()), torch.ones_like(x)
    expected = gradients(definition, of, dy)
    # At the floor what is left of 1e12 - 1e12 is their rounding.
    for options in ({}, {"create_graph": True}):
        found = gradients(rms_norm, of, dy, **options)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_about_as_near_to_float64(dtype: torch.dtype) -> None:
    of = inputs(dtype)
    x, gamma = (t.detach().double().requires_grad_() for t in of)
    wide = (x, gamma)
    dy = torch.randn(ROWS).to(dtype)
    exact = (definition(*wide), *gradients(definition, wide, dy.double()))
    ours = (rms_norm(*of), *gradients(rms_norm, of, dy))
    torchs = (definition(*of), *gradients(definition, of, dy))
    for name, a, b, c in zip(("y", "dx", "dgamma"), ours, torchs, exact, strict=True):
        errors = partial(weight_errors if name == "dgamma" else channel_errors, theirs=c)
        assert a.dtype == dtype
        # The worst channels of two ways are two draws of roundings.
        assert (errors(a) <= 4 * errors(b).max()).all(), name


def test_derivatives_of_both_orders() -> None:
    of = inputs(shape=(3, 5))
    assert torch.autograd.gradcheck(rms_norm, of)
    assert torch.autograd.gradgradcheck(rms_norm, of)


def test_zeros_give_zeros_and_the_floors_gradient() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    norm = RMSNorm(4)
    y = norm(x)
    assert (y == 0).all()
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, torch.full_like(x, 2e12))


def test_one_gradient_alone() -> None:
    for wanted in range(2):
        of = inputs()
        of[1 - wanted].requires_grad_(False)
        found = torch.autograd.grad(rms_norm(*of).sum(), of[wanted])
        expected = torch.autograd.grad(definition(*of).sum(), of[wanted])
        torch.testing.assert_close(found, expected)


def test_any_strides() -> None:
    x, gamma = torch.randn(3, 40, 4).transpose(1, 2), torch.randn(80)[::2]
    torch.testing.assert_close(rms_norm(x, gamma), definition(x, gamma))
    conjugate = torch.randn(3, 40, dtype=torch.complex64).conj().imag  # a lazy minus
    torch.testing.assert_close(rms_norm(conjugate, gamma), definition(conjugate, gamma))


def test_opcheck() -> None:
    for of in (inputs(torch.float32), inputs(torch.bfloat16, (4, 5))):
        torch.library.opcheck(rms_norm.default, of)
        backward = torch.ops.gateloop._rms_norm_backward.default
        torch.library.opcheck(backward, (of[0].detach(), *(t.detach() for t in of)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operands_that_do_not_fit_are_named(device: str) -> None:
    x, gamma = torch.randn(2, 4, device=device), torch.ones(4, device=device)
    backward = torch.ops.gateloop._rms_norm_backward
    for wrong in (torch.ones(5, device=device), torch.ones(1, 4, device=device)):
        with pytest.raises(RuntimeError, match=r"rms_norm: gamma must be \(dim\) = \(4\), got"):
            rms_norm(x, wrong)
        with pytest.raises(RuntimeError, match="_rms_norm_backward: gamma"):
            backward(x, x, wrong)
    with pytest.raises(RuntimeError, match=r"_rms_norm_backward: dy must be \[2, 4\]"):
        backward(x[:1], x, gamma)
    with pytest.raises(TypeError, match="rms_norm: x must be floating"):
        rms_norm(x.long(), gamma)
    with pytest.raises(RuntimeError, match="rms_norm: x must be"):
        rms_norm(torch.zeros((), device=device), gamma)


def test_dtypes_that_differ_are_promoted() -> None:
    x, gamma = torch.randn(ROWS).bfloat16(), torch.randn(40)
    expected = definition(x.float(), gamma)
    torch.testing.assert_close(rms_norm(x, gamma), expected)


def test_func_transforms() -> None:
    x, gamma = (t.detach() for t in inputs())
    dy = torch.randn_like(x)

    def loss(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, gamma: (f(x, gamma) * dy).sum()

    for argnums in (0, 1):
        torch.testing.assert_close(
            torch.func.grad(loss(rms_norm), argnums)(x, gamma),
            torch.func.grad(loss(definition), argnums)(x, gamma),
        )
    mapped = torch.func.vmap(rms_norm, (0, None))(x, gamma)
    torch.testing.assert_close(mapped, definition(x, gamma))
    ours, expected = (torch.func.jvp(f, (x, gamma), (dy, gamma)) for f in (rms_norm, definition))
    torch.testing.assert_close(ours, expected)


def test_forward_derivatives_of_plain_tensors() -> None:
    x, gamma = (t.detach() for t in inputs())
    tangent = torch.randn_like(x)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        found = torch.autograd.forward_ad.unpack_dual(rms_norm(dual, gamma)).tangent
        expected = torch.autograd.forward_ad.unpack_dual(definition(dual, gamma)).tangent
    torch.testing.assert_close(found, expected)


def test_a_batch_of_gradients() -> None:
    of, dys = inputs(), torch.randn(3, *ROWS, dtype=torch.float64)
    found = gradients(rms_norm, of, dys, is_grads_batched=True)
    assert not any(t.requires_grad for t in found)
    for i, dy in enumerate(dys):
        torch.testing.assert_close(
            (found[0][i], found[1][i]), gradients(definition, of, dy), msg=str(i)
        )


def test_tracers_see_the_operator() -> None:
    x, gamma = (t.detach() for t in inputs())
    traced = make_fx(rms_norm)(x, gamma)
    assert "gateloop.rms_norm" in traced.code
    other = torch.randn_like(x)
    torch.testing.assert_close(traced(other, gamma), definition(other, gamma))

    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    of = inputs()
    torch.testing.assert_close(gradients(compiled, of, other), gradients(definition, of, other))


def test_tracing_with_symbolic_sizes() -> None:
    x, gamma = (t.detach() for t in inputs())
    traced = make_fx(rms_norm, tracing_mode="symbolic")(x, gamma)
    other, gain = torch.randn(4, 6, dtype=x.dtype), torch.randn(6, dtype=x.dtype)
    torch.testing.assert_close(traced(other, gain), definition(other, gain))
    torch.testing.assert_close(torch.func.functionalize(rms_norm)(x, gamma), definition(x, gamma))


@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_a_checkpoint_may_be_watched_in_one_pass_only(watched: str) -> None:
    of = inputs()
    with Watch() if watched == "forward" else nullcontext():
        y = checkpoint(rms_norm, *of, use_reentrant=False)
    with Watch() if watched == "backward" else nullcontext():
        found = torch.autograd.grad(y.sum(), of)
    torch.testing.assert_close(found, torch.autograd.grad(definition(*of).sum(), of))


def test_hooks_may_save_in_another_dtype() -> None:
    of = inputs(torch.float32)

    def pack(t: Tensor) -> Tensor:
        return t.bfloat16() if t.ndim == 3 else t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = rms_norm(*of)
    dx, dgamma = torch.autograd.grad(y.sum(), of)
    rounded = (of[0].detach().bfloat16().float().requires_grad_(), of[1])
    expected = torch.autograd.grad(definition(*rounded).sum(), rounded)
    torch.testing.assert_close((dx.float(), dgamma), expected, rtol=1e-2, atol=1e-2)


def test_rows_that_float16_cannot_square() -> None:
    x, gamma = torch.full((2, 64), 30_000.0).half(), torch.ones(64).half()
    ones = torch.ones_like(x)
    assert torch.equal(rms_norm(x, gamma), ones)
    assert torch.equal(torch.func.vmap(rms_norm, (0, None))(x, gamma), ones)


def test_meta() -> None:
    y = rms_norm(torch.empty(ROWS, device="meta"), torch.empty(40, device="meta"))
    assert y.shape == ROWS and y.device.type == "meta"
