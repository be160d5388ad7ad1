"""Models on devices other than the CPU: torch's meta, one without code in the library, CUDA."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from drawn_models import ROWS, STEPS, TOKENS, draw

from gateloop_cpp import Transformer

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize("seed", range(12))
def test_a_model_is_made_and_differentiated_on_the_meta_device(seed: int) -> None:
    with torch.device("meta"):
        model = Transformer(**draw(seed))
        ids = torch.randint(TOKENS, (ROWS, STEPS))
    logits = model(ids)
    assert (logits.device.type, logits.shape) == ("meta", (ROWS, STEPS, TOKENS))
    loss = model(ids, return_loss=True)
    loss.backward()
    assert loss.device.type == "meta"
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.device.type == "meta" for gradient in gradients)


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")


@pytest.mark.parametrize("device", ["fake", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_everything_runs_there(device: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    paths = {"PYTHONPATH": f"{HERE.parents[1] / 'python'}:{HERE}", "GATELOOP_TEST_DEVICE": device}
    result = subprocess.run(
        [*command, str(HERE / "on_device.py")],
        env=os.environ | paths,
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(result.stdout, result.stderr)
    assert result.returncode == 0
    assert " passed" in result.stdout
    assert " skipped" not in result.stdout
