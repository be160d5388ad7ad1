"""GateLoop with heads wider than one channel: the kernels against the definition."""

from functools import partial
from itertools import product
from typing import Any

import composite
import pytest
import torch
from channels import assert_near, channel_errors
from conftest import thinned
from torch import Tensor

from gateloop_cpp import ops
from gateloop_cpp.ops import gate_loop_step

pytestmark = pytest.mark.usefixtures("implementation")
gate_loop: Any = ops.gate_loop  # of lists of arguments
F32, F64, C64, C128 = torch.float32, torch.float64, torch.complex64, torch.complex128


def definition(inputs: list[Tensor], reverse: bool) -> tuple[Tensor, Tensor]:
    """One step after another."""
    q, k, v, a, state = inputs
    steps = range(q.shape[1])
    ys: dict[int, Tensor] = {}
    for t in reversed(steps) if reverse else steps:
        per_key = a[:, t] if a.dim() == 4 else a[:, t, :, None]
        state = per_key[..., None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        real = state.real if state.is_complex() else state
        ys[t] = (q[:, t, :, None] @ real).squeeze(-2)
    y = torch.stack([ys[t] for t in steps], 1) if ys else v.clone()
    return y, state


def drawn(
    shape: tuple[int, int, int, int, int],
    is_complex: bool,
    dtype: torch.dtype = F64,
    per_key: bool = False,
) -> list[Tensor]:
    """q, k, v, a, initial_state."""
    torch.manual_seed(0)
    b, t, h, keys, values = shape
    q, k = (torch.randn(b, t, h, keys, dtype=dtype) for _ in range(2))
    v = torch.randn(b, t, h, values, dtype=dtype)
    real = F64 if dtype == F64 else F32
    modulus = 1 - torch.rand(b, t, h, *([keys] if per_key else []), dtype=real) ** 4
    modulus[:, ::7] = 0
    a = torch.polar(modulus, 6 * torch.rand_like(modulus)) if is_complex else modulus
    state = torch.randn(b, h, keys, values, dtype=a.dtype)
    return [q, k, v, a, state]


def leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


SHAPES = [
    (2, 1, 2, 3, 4),
    (1, 63, 2, 16, 16),
    (2, 64, 1, 1, 5),
    (1, 130, 3, 17, 2),
    (2, 0, 1, 2, 3),
    (2, 65, 9, 4, 4),
    (1, 66, 3, 1, 1),
    (1, 130, 2, 66, 65),  # in chunks, with real transitions a head too
]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["scan", "attention", "recurrent"])
def test_values_and_gradients(
    form: Any, shape: tuple[int, int, int, int, int], is_complex: bool, per_key: bool, reverse: bool
) -> None:
    inputs = leaves(drawn(shape, is_complex, per_key=per_key))
    ours = gate_loop(*inputs, reverse, form=form)
    theirs = definition(inputs, reverse)
    weights = [torch.randn_like(output) for output in theirs]
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    for got, expected in zip(
        torch.autograd.grad(ours, inputs, weights, materialize_grads=True),
        torch.autograd.grad(theirs, inputs, weights, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32])
@pytest.mark.parametrize("is_complex", [False, True])
def test_low_precision_loses_what_its_storage_loses(dtype: torch.dtype, is_complex: bool) -> None:
    inputs = drawn((2, 200, 2, 16, 24), is_complex, dtype)
    exact = [t.to(C128 if t.is_complex() else F64) for t in inputs]
    y, state = gate_loop(*inputs)
    expected, expected_state = gate_loop(*exact)
    assert (y.dtype, state.dtype) == (dtype, inputs[3].dtype)
    unit = torch.finfo(dtype).eps
    # Of a channel over time, and of a state over what is summed into it.
    assert_near(y, expected, 1e-5, relative=unit, of=(0, 2, 3))
    assert_near(state, expected_state, 1e-5, of=(0, 1, 3))


@pytest.mark.parametrize(
    ("is_complex", "per_key", "form"),
    thinned(product([False, True], [False, True], ["scan", "attention", "recurrent"]), 5),
)
def test_gradcheck(is_complex: bool, per_key: bool, form: str) -> None:
    inputs = leaves(drawn((1, 4, 2, 3, 2), is_complex, per_key=per_key))
    function = partial(gate_loop, reverse=per_key, form=form)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("modulus", ["half", "any", "zeros"])
@pytest.mark.parametrize("is_complex", [False, True])
def test_forms_of_a_long_sequence(is_complex: bool, modulus: str) -> None:
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 1, 4096, 1, 4, dtype=F64).unbind()
    a = (
        torch.full((1, 4096, 1), 0.5, dtype=F64)
        if modulus == "half"
        else torch.rand(1, 4096, 1).double()
    )
    if modulus == "zeros":
        a[:, ::5] = 0
    if is_complex:
        a = torch.polar(a, 6 * torch.rand_like(a))
    results = []
    for form in ("scan", "attention", "recurrent"):
        inputs = leaves([q, k, v, a])
        y, state = gate_loop(*inputs, form=form)
        results.append(
            (y, state, *torch.autograd.grad(y.square().sum() + state.abs().sum(), inputs))
        )
    for scan, *others in zip(*results, strict=True):
        assert scan.isfinite().all()
        for other in others:
            torch.testing.assert_close(other, scan, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["attention", "recurrent"])
def test_max_heads_in_every_form(form: Any) -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 2, 70, 5, dtype=F64).unbind()
    a = torch.polar(torch.rand(2, 70, 5), torch.randn(2, 70, 5)).to(C128)
    inputs = leaves([q, k, v, a, torch.randn(2, 5, dtype=C128)])
    for ours, theirs in zip(gate_loop(*inputs, form=form), gate_loop(*inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("per_key", [False, True])
def test_steps_are_the_sequence(per_key: bool) -> None:
    q, k, v, a, state = drawn((2, 9, 2, 3, 4), True, per_key=per_key)
    y, final = gate_loop(q, k, v, a, state)
    for t in range(9):
        one, state = gate_loop_step(q[:, t], k[:, t], v[:, t], a[:, t], state)
        torch.testing.assert_close(one, y[:, t])
    torch.testing.assert_close(state, final)


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("form", ["scan", "attention", "recurrent"])
def test_autocast_widens_and_loses_nothing(form: str, is_complex: bool) -> None:
    given = drawn((2, 40, 2, 3, 4), is_complex, F32)
    plain, cast = leaves(given), leaves(given)
    expected = gate_loop(*plain, form=form)
    with torch.autocast("cpu", torch.bfloat16):
        found = gate_loop(*cast, form=form)
        narrow = gate_loop(cast[0].bfloat16(), *cast[1:], form=form)
    ours = torch.autograd.grad(found[0].sum(), cast[:4])
    assert [t.dtype for t in (*found, *narrow)] == [F32, given[3].dtype] * 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(ours, torch.autograd.grad(expected[0].sum(), plain[:4]), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(narrow[0], expected[0], rtol=0.02, atol=0.1)  # of q's rounding


@pytest.mark.parametrize("form", ["scan", "attention", "recurrent"])
def test_derivatives_of_torch_func_are_taken_outside_of_autocast(form: str) -> None:
    given = drawn((2, 40, 2, 3, 4), True, F32)[:4]

    def total(*args: Tensor) -> Tensor:
        return gate_loop(*args, form=form)[0].sum()

    expected = torch.func.grad(total)(*given)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(NotImplementedError, match="must be taken outside of autocast"):
            torch.func.grad(total)(*given)
        with pytest.raises(NotImplementedError, match="must be taken outside of autocast"):
            torch.func.jvp(total, tuple(given), tuple(given))
        with torch.autocast("cpu", enabled=False):
            torch.testing.assert_close(torch.func.grad(total)(*given), expected)
        rows = torch.vmap(lambda x: gate_loop(x, *given[1:], form=form)[0])(given[0][None])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(given[0], given[0])
            y = gate_loop(dual, *given[1:], form=form)[0]  # linear in q
            tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
        leaf = given[0].clone().requires_grad_()
        mapped = torch.vmap(lambda x: gate_loop(x, *given[1:], form=form)[0])(leaf[None])
    mapped.sum().backward()  # of autograd, behind vmap alone
    torch.testing.assert_close(leaf.grad, expected)
    torch.testing.assert_close(rows[0], gate_loop(*given, form=form)[0])
    torch.testing.assert_close(tangent, rows[0])


def test_autocast_widens_transitions() -> None:
    q, k, v, a, state = drawn((2, 5, 2, 3, 4), False, F32)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = gate_loop(q, k, v, a.bfloat16(), state)
        step, _ = gate_loop_step(q[:, 0], k[:, 0], v[:, 0].bfloat16(), a[:, 0].bfloat16(), state)
    torch.testing.assert_close(step, y[:, 0], rtol=0.02, atol=0.1)  # of v's rounding


def test_another_form_is_refused() -> None:
    with pytest.raises(ValueError, match="form must be auto, scan, attention or recurrent, got x"):
        gate_loop(*drawn((1, 2, 1, 2, 2), True), form="x")


@pytest.mark.parametrize("form", ["scan", "attention", "recurrent"])
@pytest.mark.parametrize(
    ("cut", "keys", "values"),
    [*((cut, 8, 8) for cut in (0, 1, 63, 64, 100, 150)), (64, 40, 33), (77, 40, 33)],
)
def test_a_cut_sequence_carries_its_state(form: Any, cut: int, keys: int, values: int) -> None:
    inputs = leaves(drawn((1, 150, 2, keys, values), True))
    whole = gate_loop(*inputs, form=form)
    first, middle = gate_loop(*(t[:, :cut] for t in inputs[:4]), inputs[4], form=form)
    second, last = gate_loop(*(t[:, cut:] for t in inputs[:4]), middle, form=form)
    pieces = (torch.cat((first, second), 1), last)
    torch.testing.assert_close(pieces, whole, rtol=1e-12, atol=1e-12)
    weights = [torch.randn_like(output) for output in whole]
    gradients = [torch.autograd.grad(outputs, inputs, weights) for outputs in (pieces, whole)]
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)


def test_strides_are_read_in_place() -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 70, 3, 4, 8, dtype=F64).unbind(2)
    a = torch.rand(1, 1, 4, dtype=F64).expand(2, 70, 4)
    for ours, theirs in zip(
        gate_loop(q, k, v, a),
        gate_loop(q.contiguous(), k.contiguous(), v.contiguous(), a.contiguous()),
        strict=True,
    ):
        composite.assert_same(ours, theirs)
    transposed = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (q, k, v)]
    composite.assert_same(gate_loop(*transposed, a)[0], gate_loop(q, k, v, a)[0])


@pytest.mark.parametrize("is_complex", [False, True])
def test_opcheck(is_complex: bool) -> None:
    inputs = leaves(drawn((2, 70, 2, 3, 4), is_complex))
    for name in ("gate_loop", "_chunked_gate_loop"):
        arguments = (*inputs, False, None)
        torch.library.opcheck(getattr(torch.ops.gateloop, name).default, arguments)


def test_compiles_whole() -> None:
    inputs = leaves(drawn((2, 70, 2, 3, 4), True, F32))

    def loss(*given: Tensor) -> Tensor:
        y, state = gate_loop(*given)
        return y.square().sum() + state.abs().square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(*inputs), inputs)
    for got, expected in zip(ours, torch.autograd.grad(loss(*inputs), inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_gradient_of_a_vmap() -> None:
    stacked = leaves([torch.stack([t, 2 * t]) for t in drawn((1, 5, 2, 3, 4), True)])

    def loss(y: Tensor, state: Tensor) -> Tensor:
        return y.square().sum() + state.abs().square().sum()

    gradients = torch.autograd.grad(loss(*torch.func.vmap(gate_loop)(*stacked)), stacked)
    for i in range(2):
        one = leaves([t[i] for t in stacked])
        for got, expected in zip(
            gradients, torch.autograd.grad(loss(*gate_loop(*one)), one), strict=True
        ):
            torch.testing.assert_close(got[i], expected, rtol=1e-10, atol=1e-10)


# ---- The Taylor map ------------------------------------------------------------------------------


def features(x: Tensor) -> Tensor:
    """1, x_i, x_i²/√2 and the products of two channels."""
    products = [x[..., i, None] * x[..., :i] for i in range(x.shape[-1])]
    return torch.cat([torch.ones_like(x[..., :1]), x, x.square() / 2**0.5, *products], -1)


def drawn_for_taylor(t: int, is_complex: bool, dtype: torch.dtype = F64) -> list[Tensor]:
    q, k, v, a, _ = drawn((2, t, 2, 5, 3), is_complex, dtype)
    return [q, k, v, a, torch.randn(2, 2, 21, 3, dtype=a.dtype)]


def test_products_of_features_are_the_series() -> None:
    q, k = torch.randn(2, 7, 5, dtype=F64).unbind()
    s = (q * k).sum(-1)
    torch.testing.assert_close((features(q) * features(k)).sum(-1), 1 + s + s.square() / 2)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("t", [1, 63, 130])
@pytest.mark.parametrize("form", ["scan", "attention", "recurrent"])
def test_taylor_map_is_its_definition(form: Any, t: int, is_complex: bool, reverse: bool) -> None:
    inputs = leaves(drawn_for_taylor(t, is_complex))
    q, k, *rest = inputs
    results = [
        gate_loop(*inputs, reverse, form=form, feature_map="taylor"),
        definition([features(q), features(k), *rest], reverse),
    ]
    weights = [torch.randn_like(output) for output in results[0]]
    gradients = [torch.autograd.grad(outputs, inputs, weights) for outputs in results]
    for ours, theirs in ((results[0], results[1]), (gradients[0], gradients[1])):
        for got, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [F64, torch.bfloat16])
@pytest.mark.parametrize("is_complex", [False, True])
def test_taylor_map_of_one_step(is_complex: bool, dtype: torch.dtype) -> None:
    q, k, v, a, state = drawn_for_taylor(4, is_complex, dtype)
    whole, last = gate_loop(q, k, v, a, state, form="recurrent", feature_map="taylor")
    for t in range(4):
        given = (q[:, t], k[:, t], v[:, t], a[:, t], state)
        y, state = gate_loop_step(*given, feature_map="taylor")
        assert torch.equal(y, whole[:, t])
    assert torch.equal(state, last)
    with pytest.raises(ValueError, match="feature_map must be none or taylor, got exp"):
        gate_loop_step(q[:, 0], k[:, 0], v[:, 0], a[:, 0], state, "exp")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"feature_map must be none without heads \(B, H, K\)"):
        gate_loop_step(q[:, 0, 0], k[:, 0, 0], k[:, 0, 0], a[:, 0], state, "taylor")


def test_taylor_map_under_transforms() -> None:
    taylor = partial(gate_loop, feature_map="taylor")
    q, k, v, a, _ = drawn((1, 3, 1, 2, 2), True)
    inputs = leaves([q, k, v, a, torch.randn(1, 1, 6, 2, dtype=C128)])
    assert torch.autograd.gradcheck(taylor, inputs)
    assert torch.autograd.gradgradcheck(taylor, inputs)
    mapped = torch.func.vmap(taylor)(*(torch.stack([t, 2 * t]) for t in inputs))
    for got, expected in zip(mapped, taylor(*(2 * t for t in inputs)), strict=True):
        torch.testing.assert_close(got[1], expected)
    arguments = (*inputs, False, None, "taylor")
    torch.library.opcheck(torch.ops.gateloop._chunked_gate_loop.default, arguments)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("kind", ["head", "key", "taylor"])
def test_second_derivatives_over_tiles_are_those_of_the_scan(kind: str, reverse: bool) -> None:
    """150 steps: of attention 2 tiles, or 5 with a transition a key; of steps 12 blocks."""
    if kind == "taylor":
        inputs = leaves(drawn_for_taylor(150, True))
    else:
        inputs = leaves(drawn((1, 150, 2, 3, 4), True, per_key=kind == "key"))

    def second(form: str) -> tuple[Tensor, ...]:
        options = dict(form=form, feature_map="taylor" if kind == "taylor" else "none")
        outputs = gate_loop(*inputs, reverse, **options)
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in outputs]
        found = torch.autograd.grad(outputs, inputs, weights, create_graph=True)
        total = torch.stack([x.abs().square().sum() for x in found]).sum()
        return torch.autograd.grad(total, inputs)

    expected = second("scan")
    for form in ("attention", "recurrent"):
        for got, theirs in zip(second(form), expected, strict=True):
            torch.testing.assert_close(got, theirs, rtol=1e-9, atol=1e-8)


def test_taylor_map_in_low_precision() -> None:
    inputs = drawn_for_taylor(100, True, torch.bfloat16)
    exact = [t.to(C128 if t.is_complex() else F64) for t in inputs]
    expected = gate_loop(*exact, feature_map="taylor")[0]
    for form in ("scan", "attention", "recurrent"):
        y = gate_loop(*inputs, form=form, feature_map="taylor")[0]
        assert y.dtype == torch.bfloat16
        # One rounding of y to bfloat16, and float32 sums in another order.
        torch.testing.assert_close(y.to(F64), expected, rtol=1 / 128, atol=1e-4)


@pytest.mark.parametrize(
    "given, error",
    [
        (dict(feature_map="exp"), "feature_map must be none or taylor, got exp"),
        (dict(a=torch.rand(2, 9, 2, 5)), r"a must be .*\(B, T, H\) where"),
        (dict(initial_state=torch.randn(2, 2, 5, 3)), r"initial_state must be .*\[2, 2, 21, 3\]"),
    ],
)
def test_taylor_map_refuses(given: dict[str, Any], error: str) -> None:
    q, k, v, a, state = drawn_for_taylor(9, False, F32)
    given = dict(q=q, k=k, v=v, a=a, initial_state=state, feature_map="taylor") | given
    with pytest.raises(ValueError, match=error):
        gate_loop(**given)
    with pytest.raises(ValueError, match="feature_map must be none without heads"):
        gate_loop(q[..., 0], k[..., 0], v[..., 0], a, feature_map="taylor")


# ---- Sequences of different lengths --------------------------------------------------------------

CUTS = torch.tensor([0, 0, 15, 80, 80, 145, 209, 210, 210])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("per_key", [False, True])
@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("form", ["scan", "attention", "recurrent"])
def test_packed_equals_each_alone(form: Any, is_complex: bool, per_key: bool, threads: int) -> None:
    q, k, v, a, _ = drawn((1, 210, 2, 5, 4), is_complex, per_key=per_key)
    state = torch.randn(len(CUTS) - 1, 2, 5, 4, dtype=a.dtype)
    inputs = leaves([q, k, v, a, state])
    reverse = is_complex != per_key

    def alone(*given: Tensor) -> tuple[Tensor, Tensor]:
        results = []
        for n, (begin, end) in enumerate(zip(CUTS[:-1].tolist(), CUTS[1:].tolist(), strict=True)):
            mine = [t[:, begin:end] for t in given[:4]]
            results.append(gate_loop(*mine, given[4][n : n + 1], reverse, form=form))
        ys, states = zip(*results, strict=True)
        return torch.cat(ys, 1), torch.cat(states)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = gate_loop(*inputs, reverse, CUTS, form=form)
        theirs = alone(*inputs)
        weights = [torch.randn_like(output) for output in theirs]
        gradients = [torch.autograd.grad(result, inputs, weights) for result in (ours, theirs)]
    finally:
        torch.set_num_threads(before)
    for got, expected in zip(ours, theirs, strict=True):
        composite.assert_same(got, expected)
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per_key", [False, True])
def test_second_derivatives_of_packed_sequences(per_key: bool) -> None:
    q, k, v, a, _ = drawn((1, 5, 1, 2, 2), True, per_key=per_key)
    inputs = leaves([q, k, v, a, torch.randn(2, 1, 2, 2, dtype=C128)])
    cuts = torch.tensor([0, 2, 5])
    assert torch.autograd.gradgradcheck(lambda *given: gate_loop(*given, False, cuts), inputs)
    weights = [torch.randn_like(output) for output in gate_loop(*inputs, False, cuts)]
    once, again = (
        torch.autograd.grad(gate_loop(*inputs, False, cuts), inputs, weights, create_graph=graph)
        for graph in (False, True)
    )
    for got, expected in zip(once, again, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["scan", "attention", "recurrent"])
def test_second_derivatives_behind_a_mask(form: Any) -> None:
    inputs = leaves(drawn((1, 4, 1, 2, 2), True))
    mask = torch.tensor([[True, False, True, True]])
    function = partial(gate_loop, mask=mask, form=form)
    assert torch.autograd.gradgradcheck(function, inputs)
    weights = [torch.randn_like(output) for output in function(*inputs)]
    gradients = torch.autograd.grad(function(*inputs), inputs, weights, create_graph=True)
    assert all((t[~mask] == 0).all() for t in gradients[:4])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("form", ["scan", "attention", "recurrent"])
def test_padding_is_as_if_it_were_absent(form: Any, wide: bool, reverse: bool) -> None:
    torch.manual_seed(5)
    shape = (2, 12, 2, 3) if wide else (2, 12, 4)
    q, k, v = torch.randn(3, *shape, dtype=F64).unbind()
    a = torch.polar(torch.rand(shape[:3]), torch.randn(shape[:3])).to(C128)
    mask = torch.tensor(
        [[1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]]
    )
    mask = mask.bool()
    for t in (q, k, v, a):
        t[~mask] = float("nan")
    inputs = leaves([q, k, v, a])
    y, final = gate_loop(*inputs, reverse=reverse, mask=mask, form=form)
    dy, dfinal = torch.randn_like(y), torch.randn_like(final)
    dy[~mask] = float("nan")
    gradients = torch.autograd.grad((y, final), inputs, (dy, dfinal))
    for b in range(2):
        kept = leaves([t[b : b + 1, mask[b]] for t in inputs])
        alone = gate_loop(*kept, reverse=reverse, form=form)
        torch.testing.assert_close((y[b : b + 1, mask[b]], final[b : b + 1]), alone)
        expected = torch.autograd.grad(alone, kept, (dy[b : b + 1, mask[b]], dfinal[b : b + 1]))
        torch.testing.assert_close([t[b : b + 1, mask[b]] for t in gradients], list(expected))
    assert all((t[~mask] == 0).all() for t in (y, *gradients))


def test_opcheck_of_packed_sequences() -> None:
    q, k, v, a, _ = drawn((1, 80, 2, 3, 4), True)
    inputs = leaves([q, k, v, a, torch.randn(2, 2, 3, 4, dtype=C128)])
    cuts = torch.tensor([0, 70, 80])
    torch.library.opcheck(torch.ops.gateloop._chunked_gate_loop.default, (*inputs, False, cuts))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forms_round_gradients_once(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    q, k, v = torch.randn(3, 1, 1500, 1, 8).to(dtype).unbind()
    a = torch.polar(torch.full((1, 1500, 1), 0.999), torch.rand(1, 1500, 1))
    weight = torch.randn_like(v)

    def gradients(form: Any, tensors: list[Tensor]) -> list[Tensor]:
        inputs = leaves(tensors)
        y = gate_loop(*inputs, form=form)[0]
        return list(torch.autograd.grad(y, inputs, weight.to(y.dtype)))

    exact = gradients("scan", [t.to(C128 if t.is_complex() else F64) for t in (q, k, v, a)])
    errors = {
        form: [
            channel_errors(ours, theirs).max()
            for ours, theirs in zip(gradients(form, [q, k, v, a]), exact, strict=True)
        ]
        for form in ("scan", "attention")
    }
    for ours, theirs in zip(errors["attention"], errors["scan"], strict=True):
        assert ours < 1.5 * theirs + 1e-6


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("form", ["scan", "attention", "recurrent"])
@pytest.mark.parametrize("heads", [(), (3,)], ids=["max heads", "heads"])
def test_no_steps_have_gradients_without_a_state(
    heads: tuple[int, ...], form: Any, create_graph: bool
) -> None:
    inputs = [torch.randn(2, 0, 2, *heads, dtype=F64, requires_grad=True) for _ in range(3)]
    inputs.append(torch.randn(2, 0, 2, dtype=C128, requires_grad=True))
    y, state = gate_loop(*inputs, form=form)
    total = y.sum() + state.abs().sum()
    found = torch.autograd.grad(
        total, inputs, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    assert all(map(torch.equal, found, inputs))


def test_packed_forms_that_read_the_cuts_are_not_traced() -> None:
    inputs = drawn((1, 6, 2, 3, 3), True)[:4]
    cuts = torch.tensor([0, 2, 6])
    meta = [t.to("meta") for t in (*inputs, cuts)]
    for form in ("attention", "recurrent"):
        with pytest.raises(RuntimeError, match=r"cu_seqlens are read, so that it cannot be traced"):
            gate_loop(*meta[:4], cu_seqlens=meta[4], form=form)
    gate_loop(*meta[:4], cu_seqlens=meta[4])
