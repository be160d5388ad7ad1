"""Bytes one after the other: one sequence, and many together.

Everyone takes the likeliest byte; a text is right if the oracle, reading it, finds each of its
bytes as likely as the likeliest.
"""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import oracle, program, runtime
from benchmarks.contenders import Contender, Pass, Problem
from benchmarks.floors import floor, linear_shapes, products, reading
from benchmarks.model import FULL, QUICK, Inputs, Size, build, inputs, ours, theirs
from benchmarks.torch_passes import our_package

# Of the spread of the logits. A byte drawn blindly lies 2.8 below the likeliest on average;
# rounding to bfloat16 through six layers moves a logit by up to 0.05.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.2, "float16": 0.2, "int8": 0.2}
# torch has no matrix products of int8 weights: modules and floors go without.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Generate = Callable[[], Tensor]


def regret(data: Inputs, generated: Tensor) -> float:
    """How far the bytes lie below the likeliest, at the worst, in spreads of the logits."""
    prompt = data.ids.shape[1]
    # Sequences generated together are alike in cost; the oracle reads the first and the last.
    rows = [0] if len(generated) == 1 else [0, -1]
    text = torch.cat([data.ids, generated], dim=1)[rows]
    weights = {name: w.double() for name, w in data.weights.items()}
    with torch.no_grad():
        logits = oracle.transformer(weights, text[:, :-1])[:, prompt - 1 :]
    chosen = logits.gather(-1, text[:, prompt:, None]).squeeze(-1)
    return float(((logits.amax(-1) - chosen) / logits.std(-1)).max())


def our_passes(size: Size, length: int, data: Inputs) -> Mapping[str, Pass]:
    def one(dtype: torch.dtype) -> Pass:
        model: Any = build(ours, size, data).to(dtype)
        generate = partial(model.generate, data.ids, length, temperature=0)
        return Pass(generate, error=lambda: regret(data, generate()))

    return {name: one(dtype) for name, dtype in DTYPES.items()}


def their_passes(size: Size, length: int, data: Inputs) -> Mapping[str, Pass]:
    """The peer has no state to carry: it reads the whole text again for each byte. Its weights have
    to stay float32: torch has no complex arithmetic in narrower types."""
    model = build(theirs, size, data)

    def generate() -> Tensor:
        text = data.ids
        with torch.no_grad():
            for _ in range(length):
                likeliest = model(text)[:, -1].argmax(-1, keepdim=True)
                text = torch.cat([text, likeliest], dim=1)
        return text[:, data.ids.shape[1] :]

    return {"float32": Pass(generate, error=lambda: regret(data, generate()))}


class StoredModel:
    """The model in a folder, where programs find it."""

    def __init__(self, size: Size, data: Inputs) -> None:
        self.data = data
        self.folder = tempfile.TemporaryDirectory()
        our_package().checkpoint.save(build(ours, size, data), self.folder.name, overwrite=True)

    def by_program(self, length: int, dtype: str) -> tuple[Tensor, float]:
        prompt = self.data.ids[0].to(torch.uint8).numpy().tobytes()
        text, seconds = program.generate(Path(self.folder.name), prompt, length, dtype)
        generated = torch.from_numpy(np.frombuffer(text, dtype=np.uint8).astype(np.int64))
        if len(generated) != length:
            raise RuntimeError(f"gateloop generate wrote {len(generated)} bytes of {length}")
        return generated[None], seconds


def program_passes(size: Size, length: int, data: Inputs) -> Mapping[str, Pass]:
    model = StoredModel(size, data)

    def one(dtype: str) -> Pass:
        generate = partial(model.by_program, length, dtype)
        return Pass(
            generate,
            seconds=lambda: generate()[1],
            error=lambda: regret(data, generate()[0]),
        )

    return {dtype: one(dtype) for dtype in TOLERANCES}


def runtime_passes(size: Size, length: int, data: Inputs) -> Mapping[str, Pass]:
    library = runtime.library()
    model = StoredModel(size, data)

    def one(dtype: str) -> Pass:
        session = runtime.Session(library, Path(model.folder.name), dtype)
        generate = partial(session.generate, data.ids, length)
        return Pass(generate, error=lambda: regret(data, generate()))

    return {dtype: one(dtype) for dtype in TOLERANCES}


def reading_passes(length: int, how: str, data: Inputs) -> Mapping[str, Pass]:
    """Once for the prompt, then once for each byte but the first."""
    floats = sum(rows * columns for rows, columns in linear_shapes(data.weights))

    def one(floats: int) -> Pass:
        once = reading(floats, how)
        return Pass(lambda: [once() for _ in range(length)])

    share = {"float32": 1, "bfloat16": 2, "float16": 2, "int8": 4}  # of a float32 number
    return {dtype: one(floats // parts) for dtype, parts in share.items()}


def product_passes(length: int, data: Inputs) -> Mapping[str, Pass]:
    """Of the prompts, then of one row a sequence for each byte but the first."""
    sequences, prompt = data.ids.shape
    shapes = linear_shapes(data.weights)

    def one(dtype: torch.dtype) -> Pass:
        read = products(sequences * prompt, shapes, dtype, backward=False)
        step = products(sequences, shapes, dtype, backward=False)
        return Pass(lambda: (read(), [step() for _ in range(length - 1)]))

    return {name: one(dtype) for name, dtype in DTYPES.items()}


def problem(size: Size, sequences: int, prompt: int, length: int) -> Problem:
    contenders = [
        Contender("gateloop_cpp", "ours", "ours", partial(our_passes, size, length)),
        Contender("gateloop.h", "ours", "ours", partial(runtime_passes, size, length)),
    ]
    if sequences > 1:
        contenders.append(floor("matrix products", partial(product_passes, length)))
    else:
        contenders += [
            *(
                floor(f"read the weights: {how}", partial(reading_passes, length, how))
                for how in ("matrix-vector product", "dot product", "maximum")
            ),
            Contender("gateloop generate", "ours", "ours", partial(program_passes, size, length)),
            Contender("gateloop-transformer", "peer", "peer", partial(their_passes, size, length)),
        ]
    who = "one sequence" if sequences == 1 else f"{sequences} sequences together"
    return Problem(
        "generation",
        f"{who}, {length} bytes after a prompt of {prompt}",
        TOLERANCES,
        partial(inputs, size, sequences, prompt),
        lambda _: [],
        contenders,
        work=sequences * length,
    )


def problems(quick: bool) -> list[Problem]:
    if quick:
        return [problem(QUICK, 1, 16, 4), problem(QUICK, 4, 4, 4)]
    return [problem(FULL, 1, 128, 384), problem(FULL, 64, 16, 384)]
