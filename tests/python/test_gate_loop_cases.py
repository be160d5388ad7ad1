"""gate_loop in drawn cases against its definition, one step after another in float64.

`make test` draws CASES of them; GATELOOP_CASES names another number, and `make fuzz` does.
"""

import os
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
import torch
from channels import assert_near
from test_gate_loop import definition, features
from torch import Tensor

from gateloop_cpp import ops

CASES = int(os.environ.get("GATELOOP_CASES", "400"))
GROUPS = 8
gate_loop: Any = ops.gate_loop
F64, C128 = torch.float64, torch.complex128
# Of sums of some hundred terms in the type of the state, beside the size of a channel. None counts
# as smaller than this part of the largest: there the terms have cancelled.
TOLERANCE = {F64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 1e-4, torch.float16: 1e-4}
LEAST = 1e-2


@dataclass
class Case:
    form: str
    dtype: torch.dtype
    batch: int
    time: int
    heads: int
    keys: int  # 0: no axis of heads' channels
    values: int
    is_complex: bool
    per_key: bool
    taylor: bool
    reverse: bool
    has_state: bool
    how: str  # plain, mask, cu_seqlens
    cuts: list[int]
    layout: str
    seed: int


def draw(seed: int) -> Case:
    r = Random(seed)
    how = r.choice(["plain", "plain", "mask", "cu_seqlens", "cu_seqlens"])
    time = r.choice([0, 1, 2, r.randint(3, 40), r.randint(60, 150)])
    wide = r.random() < 0.8
    taylor = wide and r.random() < 0.2
    keys = r.choice([1, 2, 4, r.randint(1, 9), 16]) if wide else 0
    values = r.choice([keys, r.randint(1, 9), 16]) if wide else 0
    heads = r.choice([1, 2, 3, 9, 17])
    if taylor:
        keys = min(keys, 4)
    # More numbers a state than the kernels take step by step: kStepwiseNumbers of constants.h.
    if in_chunks := wide and r.random() < 0.08:
        keys = 12 if taylor else r.choice([66, r.randint(34, 66)])
        values = 60 if taylor else r.choice([65, r.randint(34, 65)])
        heads = min(heads, 2)
        time = r.choice([time, r.randint(60, 150)])
    cuts = sorted(r.randint(0, time) for _ in range(r.randint(0, 4)))
    return Case(
        form="scan" if in_chunks else r.choice(["scan", "scan", "attention", "recurrent"]),
        dtype=r.choice([F64, F64, torch.float32, torch.bfloat16, torch.float16]),
        batch=1 if how == "cu_seqlens" else r.randint(1, 3),
        time=time,
        heads=heads,
        keys=keys,
        values=values,
        is_complex=r.random() < 0.5,
        per_key=wide and not taylor and r.random() < 0.3,
        taylor=taylor,
        reverse=r.random() < 0.5,
        has_state=r.random() < 0.5,
        how=how,
        cuts=[0, *cuts, time],
        layout=r.choice(["plain", "plain", "time first", "every second channel"]),
        seed=seed,
    )


def laid_out(t: Tensor, layout: str) -> Tensor:
    """The same numbers in another order of memory."""
    if layout == "time first":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every second channel":
        return torch.stack([t, t], -1).flatten(-2)[..., ::2]
    return t


def arguments(case: Case) -> list[Tensor]:
    """q, k, v, a and the initial state."""
    torch.manual_seed(case.seed)
    b, t, h = case.batch, case.time, case.heads
    of_key, of_value = ([], []) if case.keys == 0 else ([case.keys], [case.values])
    q, k = (torch.randn(b, t, h, *of_key, dtype=F64).to(case.dtype) for _ in range(2))
    v = torch.randn(b, t, h, *of_value, dtype=F64).to(case.dtype)
    real = F64 if case.dtype == F64 else torch.float32
    modulus = 1 - torch.rand(b, t, h, *(of_key if case.per_key else []), dtype=real) ** 3
    modulus[:, ::7] = 0
    a = torch.polar(modulus, 6 * torch.rand_like(modulus)) if case.is_complex else modulus
    rows = len(case.cuts) - 1 if case.how == "cu_seqlens" else b
    of_taylor = 1 + case.keys + case.keys * (case.keys + 1) // 2
    of_state = [of_taylor if case.taylor else n for n in of_key]
    state = torch.randn(rows, h, *of_state, *of_value, dtype=a.dtype)
    return [*(laid_out(x, case.layout) for x in (q, k, v, a)), state]


def by_steps(case: Case, given: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k, v, a, state = given
    if case.keys == 0:
        q, k, v = (x[..., None] for x in (q, k, v))
        state = state[..., None, None]
    if case.taylor:
        q, k = features(q), features(k)
    if case.how == "cu_seqlens":
        ends = zip(case.cuts[:-1], case.cuts[1:], strict=True)
        places = [(0, list(range(*pair))) for pair in ends]
    else:
        kept = torch.ones(case.batch, case.time).bool() if mask is None else mask
        places = [(b, row.nonzero()[:, 0].tolist()) for b, row in enumerate(kept)]
    whole = torch.zeros_like(v)  # and so where a mask has no step
    states = []
    for n, (b, steps) in enumerate(places):
        alone = [x[b : b + 1, steps] for x in (q, k, v, a)]
        y, after = definition([*alone, state[n : n + 1]], case.reverse)
        whole[b, steps] = y[0]
        states.append(after)
    final = torch.cat(states)
    return (whole, final) if case.keys else (whole[..., 0], final[..., 0, 0])


def options(case: Case) -> tuple[dict[str, Any], Tensor | None]:
    named: dict[str, Any] = dict(reverse=case.reverse, form=case.form)
    if case.taylor:
        named["feature_map"] = "taylor"
    mask = None
    if case.how == "mask":
        mask = torch.rand(case.batch, case.time) < 0.7
        named["mask"] = mask
    if case.how == "cu_seqlens":
        named["cu_seqlens"] = torch.tensor(case.cuts)
    return named, mask


def gradients_of(outputs: Any, inputs: list[Tensor], weights: list[Tensor]) -> Any:
    # A state of no steps that is not given comes from no input.
    used = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    chosen, theirs = zip(*used, strict=True)
    return torch.autograd.grad(chosen, inputs, theirs, allow_unused=True)


def check(case: Case) -> None:
    given = [t.detach().requires_grad_() for t in arguments(case)]
    named, mask = options(case)
    inputs = given if case.has_state else given[:4]
    ours = gate_loop(*inputs, **named)
    # What the operator reads is exact: its rounding is that of its own sums and results.
    exact = [t.detach().to(C128 if t.is_complex() else F64).requires_grad_() for t in given]
    if not case.has_state:
        exact[4] = torch.zeros_like(exact[4]).requires_grad_()
    theirs = by_steps(case, exact, mask)
    weights = [torch.randn(o.shape, dtype=o.dtype) for o in ours]
    gradients = gradients_of(ours, inputs, weights)
    wide = [w.to(o.dtype) for w, o in zip(weights, theirs, strict=True)]
    expected = gradients_of(theirs, exact[: len(inputs)], wide)
    names = ("y", "final_state", "dq", "dk", "dv", "da", "dinitial_state")
    pairs = zip(names, (*ours, *gradients), (*theirs, *expected), strict=False)
    for name, got, right in pairs:
        of = f"{name} of {case}"
        if got is None or right is None:  # no steps: nothing flows
            assert all(t is None or not t.any() for t in (got, right)), of
        elif right.numel() > 0:
            every = tuple(range(right.ndim))
            channel = (*every[:-2], every[-1]) if name.endswith("state") else (0, *every[2:])
            least = LEAST * float(right.detach().abs().max().clamp_min(1))
            rounded = torch.finfo(got.dtype).eps / 2
            tolerance = TOLERANCE[case.dtype]
            assert_near(got, right, tolerance, rounded, of=channel, least=least, what=of)


@pytest.mark.parametrize("group", range(GROUPS))
def test_drawn_cases(group: int) -> None:
    for seed in range(group, CASES, GROUPS):
        check(draw(seed))
