"""What `gateloop train --diagnostics-every` writes, against a slow computation from checkpoints."""

import json
import math
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_batches import batch_at, read
from torch import Tensor, nn

from gateloop_cpp import checkpoint

STEP, ROWS, LENGTH, SEED = 3, 4, 16, 5
QUANTILES = [0.05, 0.25, 0.5, 0.75, 0.95]
WORDS = ("the ", "gate ", "loops ", "over ", "time ", "and ", "forgets.\n")
FLAGS = (
    *("--preset", "enwik8", "--dim", "16", "--depth", "2", "--heads", "2", "--dim-head", "8"),
    *("--length", str(LENGTH), "--batch", str(ROWS), "--accumulation", "1", "--threads", "1"),
    *("--learning-rate", "0.01", "--clip", "0.1", "--sample-length", "0", "--seed", str(SEED)),
    *("--validation-windows", "4", "--final-windows", "4"),
)
MAX_HEADS = ("--gate-loop-heads", "16")
PRE_NORM = "--no-post-ln-norm"
MODELS = {
    "polar, post-norm": MAX_HEADS,
    "polar, wide heads, real": ("--gate-loop-heads", "4", "--ablate-complex", PRE_NORM),
    "magnitude_phase": (*MAX_HEADS, "--gate", "magnitude_phase", PRE_NORM),
    "sigmoid, attention": (
        *(*MAX_HEADS, "--gate", "sigmoid", "--layers", "gate_loop,attention", PRE_NORM),
        *("--simple-gate-loop", "every"),
    ),
    "no transition": (*MAX_HEADS, "--ablate-state-transition"),
}


def train(binary: Path, text: Path, out: Path, *flags: str) -> Path:
    run(binary, "train", "--data", text, "--out", out, *FLAGS, *flags)
    return out


def run(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "text"
    chooser = random.Random(0)
    path.write_text("".join(chooser.choice(WORDS) for _ in range(20000)))
    return path


def records(run: Path) -> list[dict[str, Any]]:
    log = (run / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in log.splitlines()]


def projections(model: nn.Module, ids: Tensor) -> tuple[dict[int, Tensor], ...]:
    """By layer what to_a, the feed-forward's first projection and a simple gate loop's give."""
    transitions: dict[int, Tensor] = {}
    hidden: dict[int, Tensor] = {}
    simple: dict[int, Tensor] = {}
    ends = [(["to_a", "0"], transitions), (["1", "fn", "0"], hidden), (["to_qkva", "0"], simple)]
    for name, module in model.named_modules():
        parts = name.split(".")
        for end, found in ends:
            if parts[-len(end) :] == end and parts[0] == "layers":
                index = int(parts[1])
                module.register_forward_hook(
                    lambda _, __, output, found=found, index=index: found.update({index: output})
                )
    with torch.no_grad():
        model(ids)
    return transitions, hidden, simple


def magnitudes_and_phases(
    z: Tensor, gate: str, real: bool
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """Of a, from its definition, in float64."""
    raw = z.double().numpy()
    if gate == "sigmoid":
        return 1 / (1 + np.exp(-raw)), None
    first, second = raw[..., 0::2], raw[..., 1::2] * (0 if real else 1)
    if gate == "polar":
        return 1 / (1 + np.exp(-np.hypot(first, second))), None if real else np.arctan2(
            second, first
        )
    return 1 / (1 + np.exp(-first)), None if real else (second + math.pi) % (2 * math.pi) - math.pi


@pytest.mark.parametrize("name", MODELS)
def test_numbers(build_dir: Path, text: Path, tmp_path: Path, name: str) -> None:
    binary, flags = build_dir / "gateloop", MODELS[name]
    # The learning rate is constant: a shorter run has the weights before the step.
    runs = [
        train(binary, text, tmp_path / str(steps), *flags, "--steps", str(steps), *more)
        for steps, more in ((STEP - 1, ()), (STEP, ("--diagnostics-every", str(STEP))))
    ]
    lines = records(runs[1])
    assert ["diagnostics" in line for line in lines] == [False, False, True]
    assert lines[-1]["diagnostics"]["quantiles"] == QUANTILES
    layers = lines[-1]["diagnostics"]["layers"]
    options = json.loads((runs[1] / "config.json").read_text(encoding="utf-8"))["model"]
    before, after = (checkpoint.load(run) for run in runs)

    trained_on, valid = read(text, None)
    ids = torch.from_numpy(batch_at(trained_on, STEP - 1, range(ROWS), LENGTH, SEED)).long()
    before(ids, return_loss=True).backward()
    for index, layer in enumerate(layers):
        prefix = f"layers.{index}."
        gradients = [
            p.grad.flatten()
            for name, p in before.named_parameters()
            if name.startswith(prefix) and p.grad is not None
        ]
        # Gradients of the two implementations differ by roundings in float32.
        assert layer["gradient_norm"] == pytest.approx(float(torch.cat(gradients).norm()), rel=1e-4)
        update = weights_of(after, prefix) - weights_of(before, prefix)
        assert layer["update_norm"] == pytest.approx(float(update.norm()), rel=1e-5)
        weight_norm = float(weights_of(after, prefix).norm())
        assert layer["weight_norm"] == pytest.approx(weight_norm, rel=1e-5)

    rows = 2048 // LENGTH
    windows = torch.from_numpy(valid[: rows * LENGTH].copy()).view(rows, LENGTH).long()
    transitions, hidden, simple = projections(after, windows)
    if options["ablate_state_transition"]:
        transitions.clear()
    assert transitions.keys() == {i for i, x in enumerate(layers) if "half_life" in x}
    assert transitions or name == "no transition"
    for index, z in transitions.items():
        magnitudes, phases = magnitudes_and_phases(z, options["gate"], options["ablate_complex"])
        expected = np.quantile(magnitudes, QUANTILES)
        assert layers[index]["transition_magnitude"] == pytest.approx(expected, abs=1e-5)
        half_lives = np.quantile(np.log(0.5) / np.log(magnitudes), QUANTILES)
        # Between two values a quantile of the half-life is not that of the magnitude.
        assert layers[index]["half_life"] == pytest.approx(half_lives, rel=1e-3)
        assert ("transition_phase" in layers[index]) == (phases is not None)
        if phases is not None:
            quantiles = np.quantile(phases, QUANTILES)
            assert layers[index]["transition_phase"] == pytest.approx(quantiles, abs=1e-4)
    assert simple.keys() == {i for i, x in enumerate(layers) if "simple_half_life" in x}
    assert simple or "--simple-gate-loop" not in flags
    for index, qkva in simple.items():
        magnitudes, _ = magnitudes_and_phases(qkva.chunk(3, -1)[2], "sigmoid", real=True)
        expected = np.quantile(magnitudes, QUANTILES)
        assert layers[index]["simple_transition_magnitude"] == pytest.approx(expected, abs=1e-5)
        half_lives = np.quantile(np.log(0.5) / np.log(magnitudes), QUANTILES)
        assert layers[index]["simple_half_life"] == pytest.approx(half_lives, rel=1e-3)
    for index, layer in enumerate(layers):
        inactive = (hidden[index].flatten(0, -2) < 0).all(0).double().mean()
        assert layer["inactive_units"] == pytest.approx(float(inactive), abs=1e-9)


def weights_of(model: nn.Module, prefix: str) -> Tensor:
    named = model.named_parameters()
    return torch.cat([p.detach().flatten() for name, p in named if name.startswith(prefix)])


def test_inactive_units_are_counted(build_dir: Path, text: Path, tmp_path: Path) -> None:
    """Of a model whose units are pushed below zero before the last step."""
    binary = build_dir / "gateloop"
    out = train(binary, text, tmp_path / "run", *MAX_HEADS, "--steps", "2")
    state = out / "training_state.safetensors"
    from safetensors.torch import load_file, save_file

    from gateloop_cpp import _files

    tensors, metadata = load_file(state), _files.read_metadata(state)
    name = "model.layers.1.1.fn.0.bias"
    tensors[name][:16] = -100
    save_file(tensors, state, metadata)
    run(binary, "train", "--out", out, "--resume", "--steps", "3", "--diagnostics-every", "3")
    layers = records(out)[-1]["diagnostics"]["layers"]
    assert layers[1]["inactive_units"] == pytest.approx(16 / 64)
    assert layers[0]["inactive_units"] < 16 / 64


def test_the_losses_do_not_depend_on_it(build_dir: Path, text: Path, tmp_path: Path) -> None:
    def losses(every: str) -> list[dict[str, Any]]:
        flags = ("--steps", "6", "--diagnostics-every", every)
        return records(train(build_dir / "gateloop", text, tmp_path / every, *MAX_HEADS, *flags))

    without, every = losses("0"), losses("2")
    for first, second in zip(without, every, strict=True):
        assert first["train_bits_per_byte"] == second["train_bits_per_byte"]
        assert ("diagnostics" in second) == (second["step"] % 2 == 0)
    config = json.loads((tmp_path / "0" / "config.json").read_text(encoding="utf-8"))
    assert "diagnostics_every" not in config["training"]  # which earlier programs lack
