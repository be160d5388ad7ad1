"""Memory of gate_loop with wide heads, forward and backward: no state of every step is kept."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, thinned

PASS = """
import sys, torch
from benchmarks.worker import peak_bytes
from gateloop_cpp.ops import gate_loop

def step(time):
    q, k, v, dy = (torch.randn(1, time, 8, 64) for _ in range(4))
    a = torch.rand(1, time, 8)
    a = torch.polar(a, a) if sys.argv[1] == "complex" else a
    leaves = [t.requires_grad_() for t in (q, k, v, a)]
    y, _ = gate_loop(*leaves)
    gradients = torch.autograd.grad(y, leaves, dy)
    return sum(t.nbytes for t in (*leaves, y))

step(2)  # libraries are there before the measurement begins
before = peak_bytes()
held = step(16384)
print((peak_bytes() - before) / held)
"""


@pytest.mark.parametrize("transitions", thinned(["complex", "real"], 2))
def test_a_pass_takes_at_most_four_times_its_inputs_and_output(transitions: str) -> None:
    """All of it: inputs, output, gradients, and what lies between. The states of every step alone
    are 12 times as much, or 25 times with complex ones."""
    result = subprocess.run(
        [sys.executable, "-c", PASS, transitions],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'python'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    print(f"{float(result.stdout):.2f} times inputs and output")
    assert float(result.stdout) < 4
