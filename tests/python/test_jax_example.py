"""The JAX programs of examples/ and README.md."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax_train
import pytest

from gateloop_cpp import _histories
from gateloop_jax import load_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def run(example: str, *arguments: str | Path) -> str:
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / example, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT / "python" / "gateloop_jax")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_readmes_example() -> None:
    assert run("jax_transformer.py") == "(1, 1024, 256)\n(1, 256)\n"


def test_a_text_is_longer_than_a_sequence(tmp_path: Path) -> None:
    data = tmp_path / "text"
    data.write_bytes(bytes(100))
    options = argparse.Namespace(data=data, split="80,20", length=20)
    with pytest.raises(SystemExit, match=r"validate on holds 20 bytes, --length 20 needs 21"):
        jax_train.train(options)


def test_training_learns_and_writes_what_cpp_writes(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"The quick brown fox jumps over the lazy dog. " * 400)
    out = tmp_path / "run"
    sizes = ["--dim", "32", "--depth", "1", "--length", "64", "--batch", "4"]
    steps = ["--steps", "60", "--warmup-steps", "10", "--validate-every", "25"]
    printed = run("jax_train.py", "--data", text, "--out", out, *sizes, *steps,
                  "--learning-rate", "1e-2", "--sample-length", "8")  # fmt: skip
    assert "step 25  " in printed and "\nThe " in printed
    lines = [
        json.loads(line)
        for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [line["step"] for line in lines] == list(range(1, 61))
    # The fields of src/training/metrics.cpp.
    always = {
        "step",
        "train_bits_per_byte",
        "learning_rate",
        "gradient_norm",
        "tokens_per_second",
        "elapsed_seconds",
    }
    validated = {"validation_bits_per_byte"}
    assert lines[0].keys() == always
    assert lines[24].keys() == lines[49].keys() == always | validated
    assert lines[-1].keys() == always | validated | {"final_validation_bits_per_byte"}
    assert lines[0]["train_bits_per_byte"] > 7.5  # 256 bytes, equally likely: 8 bits
    assert lines[-1]["final_validation_bits_per_byte"] < 3
    assert [line["learning_rate"] for line in lines[8:10]] == pytest.approx([9e-3, 1e-2])
    assert lines[-1]["learning_rate"] == pytest.approx(1e-2 / 51)  # the next step's would be zero

    history = _histories.read(out)
    assert (history.planned_steps, history.bytes_per_step) == (60, 4 * 64)
    assert history.training["data"] == str(text)
    assert history.final == lines[-1]["final_validation_bits_per_byte"]

    again = run("jax_train.py", "--data", text, "--out", tmp_path / "more", "--start", out,
                "--length", "64", "--steps", "1", "--sample-length", "1")  # fmt: skip
    assert "step 1  " in again
    first = json.loads((tmp_path / "more" / "metrics.jsonl").read_text(encoding="utf-8"))
    assert first["train_bits_per_byte"] < 3
    assert load_checkpoint(out).embedding.shape == (256, 32)


def test_a_signal_ends_the_step_and_saves(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"The quick brown fox jumps over the lazy dog. " * 400)
    out = tmp_path / "run"
    log = out / "metrics.jsonl"
    sizes = ["--dim", "16", "--depth", "1", "--length", "32", "--batch", "2", "--steps", "1000000"]
    job = subprocess.Popen(
        [sys.executable, ROOT / "examples" / "jax_train.py", "--data", text, "--out", out, *sizes],
        env=os.environ | {"PYTHONPATH": str(ROOT / "python" / "gateloop_jax")},
    )
    deadline = time.monotonic() + 120
    while not (log.exists() and log.stat().st_size > 0):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(120) == 128 + signal.SIGTERM
    assert load_checkpoint(out).embedding.shape == (256, 16)
    assert log.read_text(encoding="utf-8").endswith("}\n")
