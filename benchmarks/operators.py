"""The three operators at each shape: ours, the scans of the peers, and an elementwise pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan

from benchmarks import jax_contenders, oracle, peer
from benchmarks.contenders import Array, Contender, Pass, Problem
from benchmarks.floors import elementwise, floor
from benchmarks.torch_passes import (
    compiled,
    oracle_passes,
    our_package,
    torch_passes,
)

Shape = tuple[int, int, int]
PASSES = ("forward", "forward + backward")
# Sums of float32 in another order: 1e-6 is seen. What is wrong is wrong by 1e-2 and more.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Inputs:
    arrays: list[Array]  # (B, T, D); a transition z of the polar gate is (B, T, D, 2)
    gradient: Array  # of the output


@dataclass(frozen=True)
class Operator:
    name: str
    draw: Callable[[np.random.Generator, Shape], list[Array]]
    oracle: Callable[..., Tensor]
    peer: Callable[..., Tensor]
    by_scan: Callable[..., Tensor]  # through torch's associative_scan
    # Arrays that a pass over time must move, forward and backward.
    moved: tuple[int, int]
    # The peer's takes (B D, T), and torch.compile has no complex arithmetic: the peer does not
    # compile, and torch's scan becomes slower.
    is_complex: bool = False


def normal(draw: np.random.Generator, *shape: int) -> Array:
    return draw.standard_normal(shape, dtype=np.float32)


def polar(z: Tensor) -> Tensor:
    """z: (..., 2) -> a complex (...)."""
    raw = torch.view_as_complex(z)
    magnitude = raw.abs()
    return magnitude.sigmoid() * raw / magnitude


def torch_scan(a: Tensor, x: Tensor) -> Tensor:
    def combine(left: Sequence[Tensor], right: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return right[0] * left[0], right[0] * left[1] + right[1]

    # The other mode, "pointwise", is for CUDA only.
    return torch.as_tensor(associative_scan(combine, (a, x), dim=1, combine_mode="generic")[1])


def peer_linear(a: Tensor, x: Tensor) -> Tensor:
    return torch.as_tensor(peer.associative_scan(peer.binary_operator, (a, x))[1])


def peer_simple(q: Tensor, kv: Tensor, z: Tensor) -> Tensor:
    return torch.as_tensor(peer.simple_gate_loop_operator(q, kv, z.sigmoid())[0])


def peer_polar_gate_loop(q: Tensor, k: Tensor, v: Tensor, z: Tensor) -> Tensor:
    """(B D, T)."""
    heads = [t.unsqueeze(-1) for t in (q, k, v)]
    y = peer.gate_loop_operator(*heads, polar(z)[:, :, None, None])
    return torch.as_tensor(y).squeeze(-1)


OPERATORS = {
    "linear_recurrence": Operator(
        "linear_recurrence",
        lambda draw, shape: [draw.random(shape, dtype=np.float32), normal(draw, *shape)],
        oracle.recurrence,
        peer_linear,
        torch_scan,
        (3, 5),  # a, x, h; a, h, dh, da, dx
    ),
    "simple_gate_loop": Operator(
        "simple_gate_loop",
        lambda draw, shape: [normal(draw, *shape) for _ in range(3)],
        oracle.simple_gate_loop,
        peer_simple,
        lambda q, kv, z: q * torch_scan(z.sigmoid(), kv),
        (4, 7),  # q, kv, z, y; q, kv, z, dy, dq, dkv, dz
    ),
    "polar_gate_loop": Operator(
        "polar_gate_loop",
        lambda draw, shape: [normal(draw, *shape) for _ in range(3)] + [normal(draw, *shape, 2)],
        lambda q, k, v, z: oracle.polar_gate_loop(q, k, v, z.flatten(-2)),
        peer_polar_gate_loop,
        lambda q, k, v, z: q * torch_scan(polar(z), (k * v).to(torch.complex64)).real,
        (6, 11),  # q, k, v, 2 z, y; q, k, v, 2 z, dy, dq, dk, dv, 2 dz
        is_complex=True,
    ),
}


def inputs(operator: Operator, shape: Shape) -> Inputs:
    draw = np.random.default_rng(7)
    return Inputs(operator.draw(draw, shape), normal(draw, *shape))


def ours(operator: Operator, data: Inputs) -> dict[str, Pass]:
    function = getattr(our_package().ops, operator.name)
    arrays = [x.reshape(*x.shape[:2], -1) for x in data.arrays]
    return torch_passes(lambda *leaves: function(*leaves)[0], arrays, data.gradient)


def torch_peer(
    operator: Operator, which: str, lazily: bool, shape: Shape, data: Inputs
) -> dict[str, Pass]:
    function = getattr(operator, which)
    if lazily:
        function = compiled(function)
    if not (operator.is_complex and which == "peer"):
        return torch_passes(function, data.arrays, data.gradient)
    batch, _, channels = shape

    def heads_first(x: Array) -> Array:  # (B, T, D, ...) -> (B D, T, ...)
        return np.moveaxis(x, 2, 1).reshape(batch * channels, x.shape[1], *x.shape[3:])

    def heads_last(x: Array) -> Array:
        return np.moveaxis(x.reshape(batch, channels, *x.shape[1:]), 1, 2)

    return torch_passes(function, data.arrays, data.gradient, there=heads_first, back=heads_last)


def problem(
    group: str, operator: Operator, shape: Shape, torch_scan: bool, compiling: bool
) -> Problem:
    batch, time, channels = shape
    elements = batch * time * channels
    forward, backward = operator.moved

    def torch_contender(name: str, which: str, lazily: bool = False) -> Contender:
        return Contender(name, "peer", "peer", partial(torch_peer, operator, which, lazily, shape))

    contenders = [
        Contender("torch.ops.gateloop", "ours", "ours", partial(ours, operator)),
        torch_contender("gateloop-transformer", "peer"),
        *jax_contenders.contenders(operator.name),
        floor(
            "elementwise pass",
            lambda _: {
                PASSES[0]: elementwise(forward * elements),
                PASSES[1]: elementwise((forward + backward) * elements),
            },
        ),
    ]
    if torch_scan:
        contenders.append(torch_contender("torch associative_scan", "by_scan"))
    if compiling and not operator.is_complex:
        contenders += [
            torch_contender("gateloop-transformer, compiled", "peer", lazily=True),
            torch_contender("torch associative_scan, compiled", "by_scan", lazily=True),
        ]
    return Problem(
        group,
        f"{operator.name} ({', '.join(f'{n:,}' for n in shape)})",
        dict.fromkeys(PASSES, TOLERANCE),
        partial(inputs, operator, shape),
        lambda data: oracle_passes(operator.oracle, data.arrays, data.gradient),
        contenders,
    )


def problems(quick: bool) -> list[Problem]:
    shapes = [(1, 65536, 512), (4, 256, 512), (16, 16384, 128), (8192, 8, 64), (8, 4096, 1536)]
    if quick:
        shapes = [(2, 96, 16)]
    return [
        # Torch's scan is about as fast as the reference, and compiling takes a minute for each
        # shape and pass: one shape stands for all.
        problem(
            "operators",
            operator,
            shape,
            torch_scan=shape == shapes[0],
            compiling=not quick and shape == shapes[0],
        )
        for operator in OPERATORS.values()
        for shape in shapes
    ]


def growth(quick: bool) -> list[Problem]:
    """One long sequence of 64 channels: how cost grows with its length."""
    lengths = [2**8, 2**9] if quick else [2**n for n in range(8, 21, 2)]
    simple = OPERATORS["simple_gate_loop"]
    return [
        problem("growth", simple, (1, n, 64), torch_scan=False, compiling=False) for n in lengths
    ]
