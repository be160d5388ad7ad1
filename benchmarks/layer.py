"""SimpleGateLoopLayer on one long sequence: ours, the peer's, and its matrix products."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks import oracle, peer
from benchmarks.contenders import Array, Contender, Pass, Problem
from benchmarks.floors import floor, products
from benchmarks.torch_passes import compiled, fused_module, oracle_passes, our_package, torch_passes

PASSES = ("inference", "training")
NAMES = ("norm.gamma", "to_qkva.0.weight")
# float32 against float64, normalisation and a projection before the scan: 1e-6 is seen.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Inputs:
    arrays: list[Array]  # x (B, T, D), then the parameters in the order of NAMES
    gradient: Array  # of the output


def inputs(batch: int, time: int, dim: int) -> Inputs:
    draw = np.random.default_rng(7)
    x, gradient = (draw.standard_normal((batch, time, dim), dtype=np.float32) for _ in range(2))
    gamma = 1 + 0.1 * draw.standard_normal(dim, dtype=np.float32)
    bound = dim**-0.5  # of torch's own initial values
    weight = draw.uniform(-bound, bound, (3 * dim, dim)).astype(np.float32)
    return Inputs([x, gamma, weight], gradient)


def module_passes(
    module: Callable[[int], nn.Module], lazily: bool, dim: int, data: Inputs
) -> Mapping[str, Pass]:
    layer = module(dim)

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(NAMES, parameters, strict=True))
        return torch.as_tensor(functional_call(layer, named, (x,)))

    chosen = compiled(function) if lazily else function
    return torch_passes(chosen, data.arrays, data.gradient, names=PASSES)


def ours(dim: int) -> nn.Module:
    layer: nn.Module = our_package().SimpleGateLoopLayer(dim)
    return layer


def ours_fused(dim: int) -> nn.Module:
    return fused_module(ours(dim))


def theirs(dim: int) -> nn.Module:
    layer: nn.Module = peer.SimpleGateLoopLayer(dim)
    return layer


def matrix_products(rows: int, dim: int, _: Any) -> Mapping[str, Pass]:
    shapes = [(3 * dim, dim)]
    return {
        which: Pass(products(rows, shapes, torch.float32, backward=which == "training"))
        for which in PASSES
    }


def problem(group: str, batch: int, time: int, dim: int, compile_peers: bool) -> Problem:
    contenders = [
        Contender("gateloop_cpp", "ours", "ours", partial(module_passes, ours, False, dim)),
        Contender(
            "gateloop_cpp, fused", "ours", "ours", partial(module_passes, ours_fused, False, dim)
        ),
        Contender(
            "gateloop-transformer", "peer", "peer", partial(module_passes, theirs, False, dim)
        ),
        floor("matrix products", partial(matrix_products, batch * time, dim)),
    ]
    if compile_peers:
        make = partial(module_passes, theirs, True, dim)
        contenders.append(Contender("gateloop-transformer, compiled", "peer", "peer", make))
    return Problem(
        group,
        f"SimpleGateLoopLayer({dim}) on ({batch}, {time:,}, {dim})",
        dict.fromkeys(PASSES, TOLERANCE),
        partial(inputs, batch, time, dim),
        lambda data: oracle_passes(oracle.simple_gate_loop_layer, data.arrays, data.gradient),
        contenders,
    )


def problems(quick: bool) -> list[Problem]:
    return [problem("layer", *((2, 96, 32) if quick else (1, 65536, 512)), not quick)]
