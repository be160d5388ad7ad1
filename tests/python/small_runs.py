"""Directories of runs as ``gateloop train`` leaves them, without training."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gateloop_cpp import Transformer

STEPS = 40
MODEL: dict[str, Any] = {"dim": 8, "depth": 1, "num_tokens": 16}
PARAMETERS = sum(weight.numel() for weight in Transformer(**MODEL).parameters())
PRIME = "prime|"
SAMPLE = "a sample <b>\nof text"


def write_run(
    folder: Path, training: Mapping[str, Any] | None = None, model: Mapping[str, Any] | None = None
) -> Path:
    """A run's directory with no step made yet: no weights."""
    folder.mkdir(parents=True)
    options = {"steps": STEPS, "batch": 2, "accumulation": 3, "length": 4, "seed": 0}
    config = {
        "format": 1,
        "id": "0123abcd",
        "model": MODEL | dict(model or {}),
        "training": options | dict(training or {}),
        "provenance": [{"date": "2026-01-02T03:04:05Z", "processor": "one of a test"}],
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "metrics.jsonl").touch()
    return folder


def begin_anew(run: Path, seed: int) -> None:
    """As `gateloop train --overwrite` does, with another seed."""
    shutil.rmtree(run)
    write_run(run, {"seed": seed})
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["provenance"][0]["date"] = f"2026-01-02T04:00:{seed:02}Z"
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")


def line(step: int, last: int = STEPS, scale: float = 1) -> str:
    """The record of a step; losses are proportional to `scale`."""
    values: dict[str, Any] = {
        "step": step,
        "train_bits_per_byte": scale * 8 / step,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5 + step,
        "tokens_per_second": 1000.0,
        "elapsed_seconds": 0.5 * step,
    }
    if step % 10 == 0:
        values["validation_bits_per_byte"] = scale * 7 / step
        values["sample_prime"] = PRIME
        values["sample"] = SAMPLE
    if step == last:
        values["final_validation_bits_per_byte"] = scale * 6 / step
    return json.dumps(values) + "\n"


def diagnostics(step: int) -> dict[str, Any]:
    """Of a layer of GateLoop, one channel of which never forgets, and of another."""
    norms = {"gradient_norm": 0.5, "update_norm": 0.01 * step, "weight_norm": 2.0}
    first = norms | {"inactive_units": 0.25, "half_life": [1.5 * step, 4.0 * step, None]}
    return {"quantiles": [0.05, 0.5, 0.95], "layers": [first, norms | {"inactive_units": 0.0}]}


def full_line(step: int, scale: float = 1) -> str:
    """With every scalar that a record may have; diagnostics at every tenth step."""
    values = json.loads(line(step, scale=scale)) | {"planned_steps": STEPS}
    if step % 10 == 0:
        values["diagnostics"] = diagnostics(step)
    return json.dumps(values) + "\n"


def write_steps(
    run: Path, first: int, last: int, scale: float = 1, line: Callable[..., str] = line
) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(line(step, scale=scale) for step in range(first, last + 1))
