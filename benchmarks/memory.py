"""Peak memory of one pass of training, each contender in a process of its own."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import layer, oracle
from benchmarks.contenders import Array, Contender, Home, Kind, Pass, Problem
from benchmarks.model import FULL, QUICK, Inputs, Size, build, inputs, ours, theirs
from benchmarks.torch_passes import numpy_of

PASS = "training"
TOLERANCE = 1e-4  # float32: 1e-6 is seen


def of_layer(shape: tuple[int, int, int]) -> Problem:
    problem = layer.problem("memory", *shape, compile_peers=False)
    return Problem(
        problem.group,
        problem.name,
        {PASS: problem.tolerances[PASS]},
        problem.inputs,
        problem.oracle,
        [contender for contender in problem.contenders if contender.kind != "floor"],
        unit="bytes",
    )


def model_passes(module: Callable[..., nn.Module], size: Size, data: Inputs) -> Mapping[str, Pass]:
    model: Any = build(module, size, data)

    def run() -> Tensor:
        model.zero_grad()
        loss: Tensor = model(data.ids, return_loss=True)
        torch.autograd.backward(loss)
        return loss

    return {PASS: Pass(run, lambda: numpy_of([run()]))}


def model_oracle(data: Inputs) -> list[Array]:
    """The loss alone: float64 activations of every step would not fit the memory."""
    weights = {name: w.double() for name, w in data.weights.items()}
    with torch.no_grad():
        logits = oracle.transformer(weights, data.ids[:, :-1])
        return numpy_of([F.cross_entropy(logits.flatten(0, 1), data.ids[:, 1:].flatten())])


def of_model(size: Size) -> Problem:
    def contender(name: str, kind: Kind, module: Callable[..., nn.Module]) -> Contender:
        home: Home = "ours" if kind == "ours" else "peer"
        return Contender(name, kind, home, partial(model_passes, module, size))

    return Problem(
        "memory",
        f"model on (1, {size.prompts[-1]:,})",
        {PASS: TOLERANCE},
        partial(inputs, size, 1, size.prompts[-1] + 1),
        model_oracle,
        [
            contender("gateloop_cpp", "ours", ours),
            contender(
                "gateloop_cpp, checkpoint_blocks", "ours", partial(ours, checkpoint_blocks=True)
            ),
            contender("gateloop-transformer", "peer", theirs),
        ],
        unit="bytes",
    )


def problems(quick: bool) -> list[Problem]:
    return [
        of_layer((2, 96, 32) if quick else (1, 65536, 512)),
        of_model(QUICK if quick else FULL),
    ]
