"""Peak memory of one pass forward and backward, each contender in a process of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import heads, layer, oracle
from benchmarks.contenders import Array, Contender, Home, Kind, Pass, Problem
from benchmarks.floors import floor
from benchmarks.model import (
    FULL,
    QUICK,
    Inputs,
    Size,
    Trainer,
    build,
    inputs,
    ours,
    ours_fused,
    theirs,
)
from benchmarks.operators import PASSES
from benchmarks.operators import Inputs as OperatorInputs
from benchmarks.torch_passes import numpy_of

PASS = "training"
_, BOTH = PASSES
# Of the loss: 1e-6 is seen in float32, 1e-4 in bfloat16.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}


def of_layer(shape: tuple[int, int, int]) -> Problem:
    problem = layer.problem("memory", *shape, compile_peers=False)
    return replace(
        problem,
        tolerances={PASS: problem.tolerances[PASS]},
        contenders=[contender for contender in problem.contenders if contender.kind != "floor"],
        unit="bytes",
    )


def model_passes(
    module: Callable[..., nn.Module], size: Size, micro_batches: int, data: Inputs
) -> Mapping[str, Pass]:
    model = build(module, size, data)

    def one(dtype: str) -> Pass:
        run = Trainer(model, data, micro_batches, dtype, fused=False).gradients
        return Pass(run, lambda: numpy_of([run()]))

    return {dtype: one(dtype) for dtype in TOLERANCES}


def model_oracle(data: Inputs) -> list[Array]:
    """The loss alone: float64 activations of every step would not fit the memory."""
    weights = {name: w.double() for name, w in data.weights.items()}
    with torch.no_grad():
        logits = oracle.transformer(weights, data.ids[:, :-1])
        return numpy_of([F.cross_entropy(logits.flatten(0, 1), data.ids[:, 1:].flatten())])


def of_model(
    name: str, size: Size, batch: int, length: int, micro_batches: int, dtypes: Sequence[str]
) -> Problem:
    """The peer also in micro-batches, as its train.py does, where there are several."""

    def contender(
        name: str, kind: Kind, module: Callable[..., nn.Module], micro_batches: int = 1
    ) -> Contender:
        home: Home = "ours" if kind == "ours" else "peer"
        return Contender(name, kind, home, partial(model_passes, module, size, micro_batches))

    contenders = [
        contender("gateloop_cpp", "ours", ours),
        contender("gateloop_cpp, fused", "ours", ours_fused),
        contender("gateloop_cpp, checkpoint_blocks", "ours", partial(ours, checkpoint_blocks=True)),
        contender("gateloop-transformer", "peer", theirs, micro_batches),
    ]
    if micro_batches > 1:
        contenders.append(contender("gateloop-transformer, whole batch", "peer", theirs))
    return Problem(
        "memory",
        name,
        {dtype: TOLERANCES[dtype] for dtype in dtypes},
        partial(inputs, size, batch, length + 1),
        model_oracle,
        contenders,
        unit="bytes",
    )


def heads_oracle(data: OperatorInputs) -> list[Array]:
    """y alone, step by step: the T² of surrogate attention would take minutes."""
    q, k, v, pairs = (x.astype(np.float64) for x in data.arrays)
    a = pairs[..., 0] + 1j * pairs[..., 1]
    y = np.empty_like(q)
    state = np.zeros((*q.shape[1:], v.shape[-1]), dtype=np.complex128)
    for t in range(len(q)):
        state = a[t, :, None, None] * state + k[t, :, :, None] * v[t, :, None, :]
        y[t] = (q[t, :, None, :] @ state.real)[:, 0]
    return [y]


def heads_passes(data: OperatorInputs) -> Mapping[str, Pass]:
    """With inputs of its own, so that they count."""

    def run() -> list[Array]:
        copies = OperatorInputs([x.copy() for x in data.arrays], data.gradient.copy())
        both = heads.ours(copies)[BOTH]
        return both.result()[:1] if both.result else []

    return {BOTH: Pass(run, run)}


def of_heads(shape: heads.Shape) -> Problem:
    """All memory, over that of q, k, v, a and y."""

    def inputs_and_output(data: OperatorInputs) -> Mapping[str, Pass]:
        arrays = [*data.arrays, data.gradient]
        return {BOTH: Pass(lambda: [x.copy() for x in arrays])}

    return replace(
        heads.problem(shape),
        group="memory",
        tolerances={BOTH: heads.TOLERANCE},
        oracle=heads_oracle,
        contenders=[
            Contender("torch.ops.gateloop", "ours", "ours", heads_passes),
            floor("inputs and output", inputs_and_output),
        ],
        unit="bytes",
    )


def problems(quick: bool) -> list[Problem]:
    size = QUICK if quick else FULL
    longest = size.prompts[-1]
    return [
        of_layer((2, 96, 32) if quick else (1, 65536, 512)),
        of_heads((96, 64) if quick else (16384, 64)),
        of_model(f"model on (1, {longest:,})", size, 1, longest, 1, ["float32"]),
        of_model(
            f"training step, {size.batch * size.length:,} tokens",
            size,
            size.batch,
            size.length,
            size.micro_batches,
            list(TOLERANCES),
        ),
    ]
