"""Memory of gate_loop with wide heads, forward and backward: no state of every step is kept, nor a
matrix of all pairs of steps."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, thinned

PASS = """
import sys, torch
from benchmarks.worker import peak_bytes
from gateloop_cpp.ops import gate_loop

transitions, form = sys.argv[1:3]
steps, heads, width = map(int, sys.argv[3:])
if form == "attention":  # on two threads 86 s instead of 2 where other tests share the cores
    torch.set_num_threads(1)

def step(time):
    q, k, v, dy = (torch.randn(1, time, heads, width) for _ in range(4))
    a = torch.rand(1, time, heads)
    a = torch.polar(a, a) if transitions == "complex" else a
    leaves = [t.requires_grad_() for t in (q, k, v, a)]
    y, _ = gate_loop(*leaves, form=form)
    gradients = torch.autograd.grad(y, leaves, dy)
    return sum(t.nbytes for t in (*leaves, y))

step(2)  # libraries are there before the measurement begins
before = peak_bytes()
held = step(steps)
print(int(peak_bytes() - before), held)
"""


def bytes_of_a_pass(transitions: str, form: str, *sizes: int) -> tuple[int, int]:
    """At most at once, and of its inputs and output alone. sizes: T, H, and K = V."""
    result = subprocess.run(
        [sys.executable, "-c", PASS, transitions, form, *map(str, sizes)],
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'python'}:{ROOT}"},
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    most, held = map(int, result.stdout.split())
    return most, held


@pytest.mark.parametrize("transitions", thinned(["complex", "real"], 2))
def test_a_pass_takes_at_most_four_times_its_inputs_and_output(transitions: str) -> None:
    """All of it: inputs, output, gradients, and what lies between. The states of every step alone
    are 12 times as much, or 25 times with complex ones."""
    most, held = bytes_of_a_pass(transitions, "scan", 16384, 8, 64)
    print(f"{most / held:.2f} times inputs and output")
    assert most < 4 * held


@pytest.mark.parametrize("transitions", thinned(["complex", "real"], 2))
def test_attention_holds_no_matrix_of_all_pairs_of_steps(transitions: str) -> None:
    """Rows of tiles, T × 128 numbers each: a matrix of T × T is 64 times as much."""
    time = 8192
    most, _ = bytes_of_a_pass(transitions, "attention", time, 1, 8)
    print(f"{most / (time * time * 4):.3f} times T × T numbers")
    assert most < time * time * 4 / 8
