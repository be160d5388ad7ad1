"""Memory of a training step: the train.py model's beside the peer's, and recomputed blocks; and of
the Taylor map's features."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gateloop_cpp import Transformer

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


# glibc's thresholds grow with use; how much of freed memory counts would depend on their course.
FREED_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def run(program: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'python'}:{ROOT}"} | FREED_AT_ONCE,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return result.stdout


def peak(package: str, checkpointing: str) -> float:
    """MiB above what the model itself takes."""
    return float(run(STEP, package, checkpointing))


# The peer takes less where it recomputes than where it keeps.
@pytest.mark.parametrize("how", ["checkpointing", pytest.param("keeping", marks=pytest.mark.long)])
def test_a_training_step_takes_less_memory_than_the_peers(how: str) -> None:
    ours, theirs = peak("gateloop_cpp", "checkpointing"), peak("gateloop_transformer", how)
    print(f"ours {ours:.0f} MiB, the peer {how}: {theirs:.0f} MiB")
    assert ours < theirs


# Heads of 24 keys have 325 features, which for q and k of 4096 steps would take 81 MiB.
FEATURES_MIB = 2 * 4096 * 8 * 325 * 4 / 2**20
TAYLOR = """
import sys, torch
from benchmarks.worker import peak_bytes
from gateloop_cpp.ops import gate_loop
form, kind = sys.argv[1:]
def step(time):
    given = [torch.randn(1, time, 8, channels, requires_grad=True) for channels in (24, 24, 4)]
    a = torch.rand(1, time, 8).to(torch.complex64 if kind == "complex" else torch.float32)
    before = peak_bytes()
    y, state = gate_loop(*given, a.requires_grad_(), form=form, feature_map="taylor")
    (y.sum() + state.real.sum()).backward()
    print((peak_bytes() - before) / 2**20)
torch.set_num_threads(1)
step(300)  # libraries are there before the measurement begins
step(4096)
"""


@pytest.mark.parametrize("kind", ["real", "complex"])
@pytest.mark.parametrize("form", ["scan", "attention", "recurrent"])
def test_features_of_all_steps_are_nowhere(form: str, kind: str) -> None:
    taken = float(run(TAYLOR, form, kind).split()[-1])
    print(f"{taken:.0f} MiB, features {FEATURES_MIB:.0f} MiB")
    assert taken < FEATURES_MIB / 2


def saved_bytes(model: Transformer, ids: Tensor) -> int:
    """What the forward pass keeps for the backward pass, each storage once."""
    sizes: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        kept.append(model(ids))
    return sum(sizes.values())


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(post_ln_norm=True),
        dict(gate="sigmoid", normalize_input=True),
        dict(use_gate_looped_attn=False, dim_head=8, heads=2),
    ],
    ids=str,
)
def test_recomputed_blocks_keep_their_inputs_and_have_the_same_gradients(
    options: dict[str, Any],
) -> None:
    torch.manual_seed(0)
    model = Transformer(16, num_tokens=32, depth=2, **options).double()
    ids = torch.randint(32, (2, 65))
    results = []
    for recomputed in (False, True):
        model.checkpoint_blocks = recomputed
        loss = model(ids, return_loss=True)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        results.append((saved_bytes(model, ids), loss, *gradients))
    kept, recomputed_ = results
    # A block keeps some fifteen arrays of the size of its input.
    assert recomputed_[0] < 0.5 * kept[0]
    for ours, expected in zip(recomputed_[1:], kept[1:], strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    assert "checkpoint_blocks" not in model.options


def page_faults(program: Path, folder: Path, steps: int) -> int:
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
    flags = f"--preset quick --depth 2 --sample-length 0 --steps {steps}".split()
    subprocess.run(
        [program, "train", "--data", folder / "text", "--out", folder / f"{steps}", *flags],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before


def test_steps_after_the_first_take_no_fresh_memory(build_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("Mary had a little lamb. " * 4_000, encoding="utf-8")
    few, many = (page_faults(build_dir / "gateloop", tmp_path, steps) for steps in (5, 20))
    print(f"{few} page faults in 5 steps, {many} in 20")
    # A step's activations, fetched from the system each time, were 8,000 pages.
    assert many - few < 15 * 1_000


# Not from this process: a new process inherits the greatest size of the one that began it.
PEAK = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def test_checkpointed_blocks_take_less_memory_in_the_trainer(
    build_dir: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_bytes(bytes(range(256)) * 1000)
    flags = ("--steps", "1", "--batch", "1", "--accumulation", "1", "--length", "8192")
    shared = ("--dim", "128", "--depth", "6", "--sample-length", "0", "--threads", "1")

    def peak_of_training(*more: str) -> int:
        command = (build_dir / "gateloop", "train", "--data", text, "--overwrite")
        paths = map(str, (*command, "--out", tmp_path / "run"))
        result = subprocess.run(
            [sys.executable, "-c", PEAK, *paths, *flags, *shared, *more],
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        )
        return int(result.stdout)

    whole, checkpointed = peak_of_training(), peak_of_training("--checkpoint-blocks")
    print(f"{whole // 1024} MiB, with checkpointed blocks {checkpointed // 1024} MiB")
    assert checkpointed < 0.65 * whole
