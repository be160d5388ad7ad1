"""GateLoop with wide heads: ours, the core of the reference, attention of the same shape."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import peer
from benchmarks.contenders import Array, Contender, Pass, Problem
from benchmarks.floors import floor
from benchmarks.operators import PASSES, Inputs, normal
from benchmarks.torch_passes import our_package

CHANNELS = 512  # of all heads together
# Sums of float32 in another order.
TOLERANCE = 1e-4
# Complex states of the reference, (T, H, K, V), above which its tree of copies fills the memory.
MOST_STATES = 1 << 26
ROWS = 64  # of the oracle's matrix

Shape = tuple[int, int]  # steps, channels of a head


def inputs(shape: Shape) -> Inputs:
    """q, k, v (T, H, K) and a as (re, im) (T, H, 2), |a| in [0.5, 1)."""
    time, width = shape
    draw = np.random.default_rng(7)
    sequences = [normal(draw, time, CHANNELS // width, width) for _ in range(3)]
    raw = normal(draw, time, CHANNELS // width, 2)
    size = np.linalg.norm(raw, axis=-1, keepdims=True)
    return Inputs([*sequences, raw / size / (1 + np.exp(-size))], normal(draw, *sequences[0].shape))


def oracle(data: Inputs) -> list[Array]:
    """y, dq, dk and dv in float64 as surrogate attention, some rows of its matrix at a time."""
    q, k, v, a = (x.astype(np.float64) for x in data.arrays)
    dy = data.gradient.astype(np.float64)
    results = [np.zeros_like(q) for _ in range(4)]
    for head in range(q.shape[1]):
        qs, ks, vs, dys = (np.ascontiguousarray(x[:, head]) for x in (q, k, v, dy))
        y, dq, dk, dv = (x[:, head] for x in results)
        transitions = a[:, head, 0] + 1j * a[:, head, 1]
        decay = np.zeros(len(qs), dtype=np.complex128)
        for begin in range(0, len(qs), ROWS):
            end = min(len(qs), begin + ROWS)
            weights = np.zeros((end - begin, end))
            for t in range(begin, end):
                decay[:t] *= transitions[t]
                decay[t] = 1
                weights[t - begin] = decay[:end].real
            rows, past = slice(begin, end), slice(0, end)
            scores = weights * (qs[rows] @ ks[past].T)
            similarities = weights * (dys[rows] @ vs[past].T)
            y[rows] = scores @ vs[past]
            dq[rows] = similarities @ ks[past]
            dk[past] += similarities.T @ qs[rows]
            dv[past] += scores.T @ dys[rows]
    return [np.ascontiguousarray(x) for x in results]


def passes(function: Callable[..., Tensor], data: Inputs, checked: bool = True) -> dict[str, Pass]:
    """`function` takes q, k, v (1, T, H, K) and a complex (1, T, H); all get gradients."""
    q, k, v = (torch.from_numpy(x)[None].requires_grad_() for x in data.arrays[:3])
    a = torch.view_as_complex(torch.from_numpy(data.arrays[3]))[None].requires_grad_()
    dy = torch.from_numpy(data.gradient)[None]
    leaves = [q, k, v, a] if checked else [q, k, v]

    def forward() -> list[Tensor]:
        with torch.no_grad():
            return [function(q, k, v, a)]

    def both() -> list[Tensor]:
        y = function(q, k, v, a)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    def compared(run: Callable[[], list[Tensor]]) -> Callable[[], list[Array]] | None:
        return (lambda: [t.detach()[0].numpy() for t in run()[:4]]) if checked else None

    return {
        PASSES[0]: Pass(forward, compared(forward)),
        PASSES[1]: Pass(both, compared(both)),
    }


def ours(data: Inputs) -> dict[str, Pass]:
    gate_loop = our_package().ops.gate_loop
    return passes(lambda *given: gate_loop(*given)[0], data)


def reference(data: Inputs) -> dict[str, Pass]:
    def core(q: Tensor, k: Tensor, v: Tensor, a: Tensor) -> Tensor:
        heads_first = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
        y = peer.gate_loop_operator(*heads_first, a.transpose(1, 2).flatten(0, 1)[..., None, None])
        return torch.as_tensor(y).unflatten(0, (1, -1)).transpose(1, 2)

    return passes(core, data)


def attention(data: Inputs) -> dict[str, Pass]:
    def causal(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return passes(causal, data, checked=False)


def products(shape: Shape, data: Inputs) -> dict[str, Pass]:
    """As many multiply-adds as a recurrence with a complex state of (K, K) needs at the least: 4 K²
    a step and head forward, 8 K² back, as one large product."""
    time, width = shape
    del data
    side = 1024

    def run(times: float) -> Callable[[], object]:
        x = torch.randn(max(1, round(times * time * CHANNELS * width / side**2)), side)
        w = torch.randn(side, side)
        out = torch.empty(x.shape[0], side)
        return lambda: torch.mm(x, w, out=out)

    return {PASSES[0]: Pass(run(4)), PASSES[1]: Pass(run(12))}


def problem(shape: Shape) -> Problem:
    time, width = shape
    contenders = [
        Contender("torch.ops.gateloop", "ours", "ours", ours),
        floor("matrix products", partial(products, shape)),
        floor("causal attention", attention),
    ]
    if time * CHANNELS * width <= MOST_STATES:
        contenders.append(Contender("gateloop-transformer", "peer", "peer", reference))
    return Problem(
        "wide heads",
        f"gate_loop (1, {time:,}, {CHANNELS // width}, {width})",
        dict.fromkeys(PASSES, TOLERANCE),
        partial(inputs, shape),
        oracle,
        contenders,
    )


def problems(quick: bool) -> list[Problem]:
    shapes = [(8192, 16), (8192, 64), (8192, 128), (2048, 16), (2048, 64), (2048, 128), (2048, 4)]
    return [problem(shape) for shape in ([(96, 16), (96, 4)] if quick else shapes)]
