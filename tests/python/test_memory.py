"""Peak memory of a training step of the train.py model at T = 4096, beside the peer's."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Two layers of six: what each keeps is the same.
STEP = """
import sys, torch
from benchmarks.worker import peak_bytes
package, checkpointing = sys.argv[1], sys.argv[2] == "checkpointing"
Transformer = getattr(__import__(package), "Transformer")
model = Transformer(512, num_tokens=256, depth=2, gate_loop_heads=512, post_ln_norm=True,
                    checkpoint_gate_looped_attn=checkpointing)
step = lambda time: model(torch.randint(256, (1, time + 1)), return_loss=True).backward()
step(2)  # gradients and libraries are there before the measurement begins
before = peak_bytes()
step(4096)
print((peak_bytes() - before) / 2**20)
"""


def peak(package: str, checkpointing: str) -> float:
    """MiB above what the model itself takes."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STEP, package, checkpointing],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'python'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return float(result.stdout)


def test_a_training_step_takes_less_memory_than_the_peers() -> None:
    ours = peak("gateloop_cpp", "checkpointing")
    for checkpointing in ("checkpointing", "keeping"):
        theirs = peak("gateloop_transformer", checkpointing)
        print(f"ours {ours:.0f} MiB, the peer {checkpointing}: {theirs:.0f} MiB")
        assert ours < theirs
