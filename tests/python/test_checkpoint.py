"""One model directory for the C++ program, the Python package and the peer's own class."""

import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import peer
from torch import nn

from gateloop_cpp import Transformer, checkpoint

Gateloop = Callable[..., str]


@pytest.fixture
def gateloop(build_dir: Path) -> Gateloop:
    """The C++ program; gives its standard output."""

    def call(*arguments: object) -> str:
        result = subprocess.run(
            [build_dir / "gateloop", *map(str, arguments)],
            capture_output=True,
            text=True,
            errors="replace",  # samples are bytes
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(b"".join(b"%d times the gate, " % (i * i) for i in range(150)))
    return path


@pytest.fixture
def trained(gateloop: Gateloop, text: Path, tmp_path: Path) -> Path:
    """A run of the C++ trainer with the reference's architecture."""
    out = tmp_path / "run"
    options = "--preset enwik8 --dim 32 --depth 2 --gate-loop-heads 32 --steps 8 --batch 2"
    options += " --accumulation 1 --length 32 --learning-rate 0.003"
    gateloop("train", "--data", text, "--out", out, *options.split())
    return out


def programs_bits_per_byte(gateloop: Gateloop, directory: Path, text: Path) -> float:
    """The C++ program's figure for the text as one window; it prints four digits."""
    output = gateloop("evaluate", "--checkpoint", directory, "--data", text, "--length", 10**6)
    found = re.search(r"windowed +([\d.]+) bits per byte", output)
    assert found, output
    return float(found[1])


def bits_per_byte(model: nn.Module, text: Path) -> float:
    ids = torch.tensor([list(text.read_bytes())])
    with torch.no_grad():
        return float(model(ids, return_loss=True)) / math.log(2)


def peers_options(options: dict[str, Any]) -> dict[str, Any]:
    ours = {"gate": "polar", "normalize_input": False, "transition_bias": None}
    assert all(options[name] == value for name, value in ours.items())
    return {name: value for name, value in options.items() if name not in ours}


def test_trained_in_cpp_loads_in_python_and_in_the_peer(
    trained: Path, gateloop: Gateloop, text: Path
) -> None:
    ours = checkpoint.load(trained)
    theirs = peer.Transformer(**peers_options(checkpoint.load_options(trained)))
    theirs.load_state_dict(checkpoint.load_weights(trained), strict=True)
    figure = programs_bits_per_byte(gateloop, trained, text)
    assert abs(bits_per_byte(ours, text) - figure) < 1e-4
    assert abs(bits_per_byte(theirs, text) - figure) < 1e-4
    best = checkpoint.load_weights(trained, "best")
    assert best.keys() == ours.state_dict().keys()


@pytest.mark.parametrize(
    "options",
    [
        dict(gate_loop_heads=8, sub_ln=True),
        dict(gate="sigmoid", normalize_input=True, transition_bias=(-1.0, 5.0)),
        dict(use_gate_looped_attn=False, rotary_emb=True, dim_head=8, heads=2),
    ],
    ids=str,
)
def test_saved_in_python_loads_in_cpp(
    options: dict[str, Any], gateloop: Gateloop, text: Path, tmp_path: Path
) -> None:
    model = Transformer(32, num_tokens=256, depth=2, **options)
    directory = tmp_path / "model"
    checkpoint.save(model, directory)
    expected = bits_per_byte(model, text)
    assert abs(programs_bits_per_byte(gateloop, directory, text) - expected) < 1e-4
    assert gateloop("generate", "--checkpoint", directory, "--length", 5)
    twin = checkpoint.load(directory)
    assert not twin.training
    for ours, theirs in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_peers_weights_go_to_cpp(gateloop: Gateloop, text: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(dim=32, num_tokens=256, depth=2, sub_ln=True)
    theirs = peer.Transformer(**options)
    ours = Transformer(**options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    checkpoint.save(ours, tmp_path / "model")
    figure = programs_bits_per_byte(gateloop, tmp_path / "model", text)
    assert abs(bits_per_byte(theirs, text) - figure) < 1e-4


# ---- Nothing is lost -----------------------------------------------------------------------------


def small() -> Transformer:
    return Transformer(8, num_tokens=8, depth=1)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_saved_model_is_not_overwritten_unasked(tmp_path: Path) -> None:
    checkpoint.save(small(), tmp_path)
    before = contents(tmp_path)
    assert before.keys() == {"config.json", "model.safetensors"}
    with pytest.raises(FileExistsError, match=r"config\.json, model\.safetensors"):
        checkpoint.save(small(), tmp_path)
    assert contents(tmp_path) == before
    checkpoint.save(small(), tmp_path, overwrite=True)
    assert contents(tmp_path)["model.safetensors"] != before["model.safetensors"]


def test_a_failed_write_leaves_the_former_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(small(), tmp_path)
    before = contents(tmp_path)

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(small(), tmp_path, overwrite=True)
    assert contents(tmp_path) == before


def test_a_module_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"save: model must be a gateloop_cpp\.Transformer"):
        checkpoint.save(nn.Linear(2, 2), tmp_path)  # type: ignore[arg-type]
    assert not contents(tmp_path)


def rewrite(**changes: Any) -> Callable[[Path], object]:
    def change(directory: Path) -> object:
        path = directory / "config.json"
        return path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "config.json").write_text("{"), r"config\.json: not JSON"),
        (rewrite(model=None), r'no "model" in it'),
        (rewrite(format=7), r"format 7; this package reads 1"),
        (rewrite(model={"dim": 8, "wings": 2}), r"unknown options wings"),
        (
            lambda d: (d / "model.safetensors").write_bytes(b"nothing"),
            r"model\.safetensors: not a valid safetensors file",
        ),
        (rewrite(model={"dim": 4, "num_tokens": 8, "depth": 1}), r"weights are not this model's"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    checkpoint.save(small(), tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        checkpoint.load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        checkpoint.load(tmp_path)
    checkpoint.save(small(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.best\.safetensors"):
        checkpoint.load(tmp_path, "best")
