"""One model directory for the C++ program, the Python package and the peer's own class."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HAS_JAX
from interrupted import interruptions, synced_renames
from parity import peer
from safetensors.torch import load_file, save_file
from torch import nn

from gateloop_cpp import Transformer, _files, checkpoint
from gateloop_cpp._spec import stored

ROOT = Path(__file__).resolve().parents[2]

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


def test_tied_weights(gateloop: Gateloop, text: Path, tmp_path: Path) -> None:
    def tie(model: Transformer) -> None:
        model.to_logits[1].weight = model.token_emb.weight  # type: ignore[index]

    model = Transformer(32, num_tokens=256, depth=2)
    tie(model)
    for _ in range(2):
        checkpoint.save(model, tmp_path, overwrite=True)
        twin = checkpoint.load(tmp_path)
        tie(twin)
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(twin.state_dict()[name], tensor, rtol=0, atol=0)
        model = twin
    figure = programs_bits_per_byte(gateloop, tmp_path, text)
    assert abs(bits_per_byte(model, text) - figure) < 1e-4


def test_later_models_of_a_run_keep_its_beginning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, training = Transformer(dim=8, depth=1, num_tokens=16), {"steps": 3}

    def provenance_after(entry: dict[str, str], same_run: bool) -> list[dict[str, str]]:
        monkeypatch.setattr(_files, "_provenance", lambda *_: entry)
        checkpoint.save(model, tmp_path, overwrite=True, training=training, same_run=same_run)
        config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
        assert config["training"] == training
        written: list[dict[str, str]] = config["provenance"]
        return written

    first, later, resumed = (
        {"command": command, "date": date} for command, date in (("a", "1"), ("a", "2"), ("b", "3"))
    )
    assert provenance_after(first, same_run=False) == [first]
    assert provenance_after(later, same_run=True) == [first]
    assert provenance_after(resumed, same_run=True) == [first, resumed]
    assert provenance_after(later, same_run=False) == [later]


def test_provenance(gateloop: Gateloop, trained: Path, tmp_path: Path) -> None:
    checkpoint.save(small(), tmp_path / "ours")
    for directory, program in ((tmp_path / "ours", "gateloop-cpp"), (trained, "gateloop ")):
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        (written,) = config["provenance"]
        assert written["program"].startswith(program)
        assert torch.__version__.startswith(written["torch"].split("+")[0])
        assert written["processor"]
        assert len(written["command"]) > 1
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", written["date"])
        shown = gateloop("info", "--checkpoint", directory)
        assert written["date"] in shown
        assert written["revision"] or not (ROOT / ".git").exists()
    gateloop("quantize", "--checkpoint", trained, "--out", tmp_path / "int8")
    small_one = json.loads((tmp_path / "int8" / "config.json").read_text(encoding="utf-8"))
    commands = [entry["command"] for entry in small_one["provenance"]]
    assert commands[0] == written["command"] and "quantize" in commands[1]
    gateloop("train", "--out", trained, "--resume", "--steps", "9")
    config = json.loads((trained / "config.json").read_text(encoding="utf-8"))
    assert ["--resume" in entry["command"] for entry in config["provenance"]] == [False, True]


LOADERS = ["gateloop_cpp.checkpoint:load", *["gateloop_jax:load_checkpoint"] * HAS_JAX]


@pytest.mark.parametrize("package", LOADERS)
def test_files_are_utf_8_in_every_locale(package: str, tmp_path: Path) -> None:
    checkpoint.save(small(), tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"training": {"data": "données"}}
    path.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    module, function = package.split(":")
    packages = [str(ROOT / "python"), str(ROOT / "python" / "gateloop_jax")]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    result = subprocess.run(
        [sys.executable, "-c", f"from {module} import {function}; {function}({str(tmp_path)!r})"],
        env=os.environ | locale | {"PYTHONPATH": os.pathsep.join(packages)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr


GERMAN_HOST = """
import locale, sys, torch
if sys.argv[1] == "german":
    locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
    assert locale.localeconv()["decimal_point"] == ","
from gateloop_cpp import Decoder, Sampler, checkpoint
from gateloop_cpp.transformer import Transformer
torch.manual_seed(1)
model = Transformer(8, num_tokens=256, depth=1, frac_gradient_state_transition=0.75)
checkpoint.save(model, sys.argv[2])
decoder = Decoder(checkpoint.load(sys.argv[2]))
logits, state = decoder(torch.tensor([[1, 2, 3]]))
state.save(sys.argv[2] + "/state")
sampler = Sampler(temperature=0.75, top_p=0.5, seed=1)
print(logits.sum().item(), model.generate(torch.tensor([[1]]), 20, temperature=0.75).tolist())
print([sampler.draw(logits[:, -1]).tolist() for _ in range(5)])
try:
    Sampler(top_p=-1.5)
except ValueError as error:
    print(error)
"""


def test_a_german_host_writes_and_reads_the_same(tmp_path: Path) -> None:
    locales = tmp_path / "locales"
    locales.mkdir()
    make = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(locales / "de_DE.UTF-8")]
    if shutil.which(make[0]) is None or subprocess.run(make, capture_output=True).returncode > 1:
        pytest.skip("no sources of locales")
    packages = {"PYTHONPATH": str(ROOT / "python"), "LOCPATH": str(locales)}
    seen = {}
    for host in ("plain", "german"):
        directory = tmp_path / host
        result = subprocess.run(
            [sys.executable, "-c", GERMAN_HOST, host, directory],
            env=os.environ | packages,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stderr
        config = json.loads((directory / "config.json").read_bytes())
        del config["provenance"]
        weights = load_file(directory / "model.safetensors")
        saved = {name: tensor.tolist() for name, tensor in weights.items()}
        seen[host] = result.stdout, saved, (directory / "state").read_bytes(), config
    assert seen["german"] == seen["plain"]


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


@pytest.mark.parametrize("stays", [False, True], ids=["failure", "kill"])
@pytest.mark.parametrize("options", [dict(dim=16), dict(dim=8, sub_ln=True)], ids=str)
def test_an_interrupted_save_leaves_one_model(
    options: dict[str, Any], stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"old": small(), "new": Transformer(num_tokens=8, depth=1, **options)}
    folder = tmp_path / "model"

    def save_old() -> None:
        checkpoint.save(models["old"], folder, overwrite=True)
        shutil.copy(folder / "model.safetensors", folder / "model.best.safetensors")

    def save_new() -> None:
        checkpoint.save(models["new"], folder, overwrite=True)

    found = []
    for calls in interruptions(
        monkeypatch, save_old, save_new, (checkpoint, "save_file"), stays=stays
    ):
        loaded = checkpoint.load(folder)
        (name,) = [
            name
            for name, model in models.items()
            if model.options == loaded.options
            and all(map(torch.equal, loaded.state_dict().values(), model.state_dict().values()))
        ]
        if (folder / "model.best.safetensors").exists():
            assert checkpoint.load_options(folder, "best") == stored(models["old"].options)
        found.append(name)
        assert calls < 100
    if stays:  # the old one, and from some call on the new one
        assert found == sorted(found, reverse=True)
    assert set(found) == {"old", "new"}
    assert len(found) > 8


def test_a_saved_model_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = synced_renames(monkeypatch, lambda: checkpoint.save(small(), tmp_path))
    assert targets == [tmp_path / "model.safetensors", tmp_path / "config.json"]


def test_a_failed_write_leaves_the_former_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(small(), tmp_path)
    before = contents(tmp_path)

    def full(tensors: object, path: Path, metadata: object) -> None:
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
        return path.write_text(
            json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8"
        )

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda d: (d / "config.json").write_text("{", encoding="utf-8"),
            r"config\.json: not JSON",
        ),
        (rewrite(model=None), r'no "model" in it'),
        (rewrite(format=7), r"format 7; this package reads format 1"),
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


def set_tensors(**changes: torch.Tensor | None) -> Callable[[Path], object]:
    """Tensors of model.safetensors by other names than theirs, which have dots."""

    def change(directory: Path) -> object:
        file = directory / "model.safetensors"
        names = {"matrix": MATRIX, "scale": f"{MATRIX}.scale", "vector": "to_logits.0.gamma"}
        tensors = load_file(file) | {names[name]: t for name, t in changes.items()}
        return save_file({name: t for name, t in tensors.items() if t is not None}, file)

    return change


MATRIX = "layers.0.1.fn.0.weight"
BYTES = torch.ones(32, 8, dtype=torch.int8)
STORED: dict[str, Callable[[Path], object]] = {
    "a scale of one number": set_tensors(matrix=BYTES, scale=torch.ones(1)),
    "a scale of no rows": set_tensors(matrix=BYTES, scale=torch.tensor(1.0)),
    "a scale too short": set_tensors(matrix=BYTES, scale=torch.ones(31)),
    "a scale of half precision": set_tensors(matrix=BYTES, scale=torch.ones(32).half()),
    "no scale": set_tensors(matrix=BYTES),
    "a scale without int8": set_tensors(scale=torch.ones(32)),
    "int8 of another shape": set_tensors(matrix=BYTES[:4], scale=torch.ones(4)),
    "int8 of one axis": set_tensors(matrix=BYTES[0], scale=torch.ones(1)),
    "int64": set_tensors(matrix=BYTES.long()),
    "a vector of int8": set_tensors(vector=BYTES[0]),
    "several": set_tensors(matrix=BYTES, vector=torch.ones(3).bool()),
}


@pytest.mark.parametrize("damage", STORED.values(), ids=STORED)
def test_stored_weights_are_refused_in_the_words_of_the_program(
    damage: Callable[[Path], object], build_dir: Path, tmp_path: Path
) -> None:
    checkpoint.save(small(), tmp_path)
    damage(tmp_path)
    command: list[str | Path] = [build_dir / "gateloop", "info", "--checkpoint", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    expected = done.stderr.removeprefix("gateloop: ").removesuffix("\n")
    assert done.returncode != 0 and expected.startswith(f"{tmp_path / 'model.safetensors'}: ")
    for load in (checkpoint.load, checkpoint.load_weights):
        with pytest.raises(ValueError) as error:
            load(tmp_path)
        assert str(error.value) == expected


def test_a_directory_need_not_be_named_in_utf_8(tmp_path: Path) -> None:
    folder, model = tmp_path / os.fsdecode(b"bad\xff"), small()
    checkpoint.save(model, folder)
    loaded = checkpoint.load(folder).state_dict()
    assert all(map(torch.equal, loaded.values(), model.state_dict().values()))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        checkpoint.load(tmp_path)
    checkpoint.save(small(), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.best\.safetensors"):
        checkpoint.load(tmp_path, "best")
