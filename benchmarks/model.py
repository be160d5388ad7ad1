"""The model of the reference's train.py: a training step, and reading a prompt. And a training step
of the `quick` preset.

Ours makes one step of the whole batch; the peer does as its train.py, four micro-batches, and is
also shown with the whole batch at once. All clip the gradient and update by Adam.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import oracle, peer, program
from benchmarks.contenders import AbsentError, Array, Contender, Pass, Problem
from benchmarks.floors import floor, linear_shapes, onednn_products, products
from benchmarks.torch_passes import compiled, expect_options, fused_module, numpy_of, our_package

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Relative error of logits, or of all gradients together. float32: the reference's gradients have
# 1.6e-4. bfloat16: its logits 4e-3 and its gradients 1.0e-1, and twice what PyTorch itself loses is
# the limit.
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-1}


# What the presets of `gateloop train` say of the model, beside its size.
PRESETS: dict[str, dict[str, Any]] = {
    "enwik8": dict(post_ln_norm=True),
    "quick": dict(
        gate="sigmoid", normalize_input="mean", transition_bias=(-1, 5), simple_gate_loop=True
    ),
}


@dataclass(frozen=True)
class Size:
    preset: str = "enwik8"
    dim: int = 512
    depth: int = 6
    batch: int = 16
    micro_batches: int = 4
    length: int = 256
    prompts: tuple[int, ...] = (1024, 16384)
    steps: int = 4  # of the program in a measurement

    @property
    def options(self) -> dict[str, Any]:
        return dict(num_tokens=256, dim=self.dim, depth=self.depth, **PRESETS[self.preset])

    @property
    def flags(self) -> list[str]:
        """The same model and batch for the program."""
        model = ["--dim", self.dim, "--depth", self.depth, "--gate-loop-heads", self.dim]
        rows = self.batch // self.micro_batches
        batch = ["--batch", rows, "--accumulation", self.micro_batches, "--length", self.length]
        return ["--preset", self.preset, *map(str, model), *map(str, batch)]


FULL = Size()
QUICK = Size(dim=32, depth=1, batch=4, micro_batches=2, length=32, prompts=(96,))
# The preset `quick` of the program; what is called quick elsewhere are shapes for tests.
SMALL = Size("quick", dim=128, depth=5, batch=8, micro_batches=1, steps=40)
SMALL_QUICK = Size("quick", dim=32, depth=1, batch=4, micro_batches=1, length=32)


@dataclass(frozen=True)
class Inputs:
    weights: dict[str, Tensor]
    ids: Tensor  # (B, T) int64


def drawn_weights(size: Size) -> dict[str, Tensor]:
    """Of the `quick` preset, which the peer does not have; every revision of ours gets these."""
    d = size.dim
    layer = {
        "0.fn.to_qkv.weight": (3 * d, d),
        "0.fn.to_a.0.weight": (d, d),
        "0.fn.to_a.0.bias": (d,),
        "0.fn.to_gates.0.weight": (d, d),
        "0.fn.to_out.weight": (d, d),
        "0.norm.gamma": (d,),
        "1.fn.0.weight": (4 * d, d),
        "1.fn.0.bias": (4 * d,),
        "1.fn.2.weight": (d, 4 * d),
        "1.fn.2.bias": (d,),
        "1.norm.gamma": (d,),
        "2.norm.gamma": (d,),
        "2.to_qkva.0.weight": (3 * d, d),
    }
    shapes: dict[str, tuple[int, ...]] = {
        "token_emb.weight": (256, d),
        **{f"layers.{i}.{name}": shape for i in range(size.depth) for name, shape in layer.items()},
        "to_logits.0.gamma": (d,),
        "to_logits.1.weight": (256, d),
    }

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if len(shape) == 2:
            return torch.randn(shape) / shape[1] ** 0.5
        return 0.1 * torch.randn(shape) + (1 if name.endswith("gamma") else 0)

    return {name: draw(name, shape) for name, shape in shapes.items()}


def inputs(size: Size, batch: int, length: int) -> Inputs:
    torch.manual_seed(7)
    of_peer = size.preset == "enwik8"
    return Inputs(
        peer.Transformer(**size.options).state_dict() if of_peer else drawn_weights(size),
        torch.from_numpy(np.random.default_rng(7).integers(0, 256, (batch, length))),
    )


def build(module: Callable[..., nn.Module], size: Size, data: Inputs) -> nn.Module:
    model = module(**size.options)
    model.load_state_dict(data.weights)
    return model


def ours(**options: Any) -> nn.Module:
    transformer = our_package().Transformer
    expect_options(transformer, *options)
    model: nn.Module = transformer(**options)
    return model


def ours_fused(**options: Any) -> nn.Module:
    return fused_module(ours(**options))


def theirs(**options: Any) -> nn.Module:
    model: nn.Module = peer.Transformer(**options)
    return model


def autocast(dtype: str) -> torch.autocast:
    return torch.autocast("cpu", DTYPES[dtype], enabled=dtype != "float32")


# ---- A training step -----------------------------------------------------------------------------


class Trainer:
    def __init__(
        self,
        model: nn.Module,
        data: Inputs,
        micro_batches: int,
        dtype: str,
        fused: bool,
        forward: Callable[..., Tensor] | None = None,
    ) -> None:
        self.model, self.dtype = model, dtype
        self.forward = model if forward is None else forward  # `or` calls len() of a compiled one
        self.parts = data.ids.chunk(micro_batches)
        self.names = list(data.weights)
        # The reference's train.py; fused is for whoever writes a new one.
        self.optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=fused)

    def gradients(self) -> Tensor:
        """Leaves them in the parameters and returns the loss."""
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for part in self.parts:
            with autocast(self.dtype):
                loss = self.forward(part, return_loss=True) / len(self.parts)
            torch.autograd.backward(loss)
            total += loss.detach()
        return total

    def result(self) -> list[Array]:
        loss, parameters = self.gradients(), dict(self.model.named_parameters())
        rows = [torch.as_tensor(parameters[name].grad).flatten() for name in self.names]
        return numpy_of([loss, torch.cat(rows)])

    def step(self) -> None:
        self.gradients()
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()


def training_passes(
    module: Callable[..., nn.Module],
    size: Size,
    micro_batches: int,
    fused: bool,
    data: Inputs,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    lazily: bool = False,
) -> Mapping[str, Pass]:
    passes = {}
    for dtype in dtypes:
        model = build(module, size, data)
        forward = compiled(model) if lazily else None
        trainer = Trainer(model, data, micro_batches, dtype, fused, forward)
        passes[dtype] = Pass(trainer.step, trainer.result)
    return passes


def training_oracle(data: Inputs) -> list[Array]:
    weights = {name: w.double().requires_grad_() for name, w in data.weights.items()}
    logits = oracle.transformer(weights, data.ids[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), data.ids[:, 1:].flatten())
    gradients = torch.autograd.grad(loss, list(weights.values()))
    return numpy_of([loss, torch.cat([g.flatten() for g in gradients])])


def program_training(size: Size, processes: int, data: Inputs) -> Mapping[str, Pass]:
    def error(flags: list[str]) -> float:
        """Of the loss of its initial weights: vanishing steps leave them as they are. The text has
        the same loss wherever a batch is taken from."""
        from safetensors.torch import load_file

        still = [*flags, "--learning-rate", "1e-30"]
        with tempfile.TemporaryDirectory() as folder:
            (note,) = program.train(b"a" * 100_000, still, 1, Path(folder), processes)
            weights = load_file(Path(folder) / "run" / "model.safetensors")
        ids = torch.full((1, size.length + 1), ord("a"))
        expected = training_oracle(Inputs(weights, ids))[0] / np.log(2)
        return abs(note["train_bits_per_byte"] - float(expected)) / float(expected)

    def one(dtype: str) -> Pass:
        flags = [*size.flags, "--dtype", dtype]
        tokens = size.batch * size.length
        seconds = partial(program.seconds_per_step, flags, tokens, size.steps, processes)
        return Pass(seconds, seconds=seconds, error=partial(error, flags))

    return {dtype: one(dtype) for dtype in DTYPES}


def matrix_products(rows: int, backward: bool, data: Inputs) -> Mapping[str, Pass]:
    shapes = linear_shapes(data.weights)
    return {name: Pass(products(rows, shapes, dtype, backward)) for name, dtype in DTYPES.items()}


def onednn_matrix_products(rows: int, backward: bool, data: Inputs) -> Mapping[str, Pass]:
    shapes = linear_shapes(data.weights)
    return {"float32": Pass(onednn_products(rows, shapes, backward))}


def floors(rows: int, backward: bool) -> list[Contender]:
    return [
        floor("matrix products", partial(matrix_products, rows, backward)),
        floor("matrix products, oneDNN", partial(onednn_matrix_products, rows, backward)),
    ]


def training(size: Size, name: str, others: Sequence[Contender]) -> Problem:
    rows = size.batch * size.length
    return Problem(
        "model",
        f"{name}, {rows:,} tokens",
        TOLERANCES,
        partial(inputs, size, size.batch, size.length + 1),
        training_oracle,
        [
            Contender(
                "gateloop_cpp", "ours", "ours", partial(training_passes, ours, size, 1, True)
            ),
            Contender(
                "gateloop_cpp, fused",
                "ours",
                "ours",
                partial(training_passes, ours_fused, size, 1, True),
            ),
            Contender("gateloop train", "ours", "ours", partial(program_training, size, 1)),
            *others,
            *floors(rows, True),
        ],
    )


def training_beside_the_reference(size: Size, compile_peers: bool) -> Problem:
    def contender(name: str, micro_batches: int, **options: Any) -> Contender:
        make = partial(training_passes, theirs, size, micro_batches, False, **options)
        return Contender(name, "peer", "peer", make)

    others = [
        Contender(
            "gateloop train, two processes", "ours", "ours", partial(program_training, size, 2)
        ),
        contender("gateloop-transformer", size.micro_batches),
        contender("gateloop-transformer, whole batch", 1),
    ]
    if compile_peers:
        others.append(contender("gateloop-transformer, compiled", size.micro_batches, lazily=True))
    return training(size, "training step", others)


# ---- Reading a prompt ----------------------------------------------------------------------------


def prefill_passes(
    module: Callable[..., nn.Module], size: Size, data: Inputs
) -> Mapping[str, Pass]:
    model = build(module, size, data)

    def one(dtype: str) -> Pass:
        def forward() -> Tensor:
            with torch.no_grad(), autocast(dtype):
                logits: Tensor = model(data.ids)
                return logits

        return Pass(forward, lambda: numpy_of([forward().float()]))

    return {dtype: one(dtype) for dtype in DTYPES}


def decoder_passes(size: Size, data: Inputs) -> Mapping[str, Pass]:
    """Of the runtime, with weights stored in the dtype."""
    package = our_package()
    if not hasattr(package, "Decoder"):
        raise AbsentError("this revision has no Decoder")

    def one(dtype: str) -> Pass:
        decoder = package.Decoder(build(ours, size, data).to(DTYPES[dtype]))
        return Pass(lambda: decoder(data.ids), lambda: numpy_of([decoder(data.ids)[0]]))

    return {dtype: one(dtype) for dtype in DTYPES}


def prefill_oracle(data: Inputs) -> list[Array]:
    with torch.no_grad():
        weights = {name: w.double() for name, w in data.weights.items()}
        return numpy_of([oracle.transformer(weights, data.ids)])


def prefill(size: Size, tokens: int) -> Problem:
    return Problem(
        "model",
        f"prefill, {tokens:,} tokens",
        TOLERANCES,
        partial(inputs, size, 1, tokens),
        prefill_oracle,
        [
            Contender("gateloop_cpp", "ours", "ours", partial(prefill_passes, ours, size)),
            Contender(
                "gateloop_cpp, fused", "ours", "ours", partial(prefill_passes, ours_fused, size)
            ),
            Contender("gateloop_cpp, Decoder", "ours", "ours", partial(decoder_passes, size)),
            Contender(
                "gateloop-transformer", "peer", "peer", partial(prefill_passes, theirs, size)
            ),
            *floors(tokens, False),
        ],
    )


def problems(quick: bool) -> list[Problem]:
    size = QUICK if quick else FULL
    return [
        training_beside_the_reference(size, compile_peers=not quick),
        training(SMALL_QUICK if quick else SMALL, "training step of `quick`", []),
        *(prefill(size, tokens) for tokens in size.prompts),
    ]
