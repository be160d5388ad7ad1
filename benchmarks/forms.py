"""The three forms of gate_loop beside each other, over steps and widths of heads.

    python -m benchmarks.forms

Prints a table of milliseconds, forward and forward + backward: the fastest call of all rounds, the
forms in turns. One sequence of 512 channels, complex transitions of each head, float32. Of more
steps than these the other forms take seconds.
"""

import argparse
from functools import partial
from pathlib import Path

import torch

from benchmarks.environment import ROOT
from benchmarks.timing import interleave, seconds_of
from benchmarks.torch_passes import Run, operator_runs

CHANNELS = 512
FORMS = ("scan", "attention", "recurrent")
STEPS = (1, 4, 16, 64, 256)
WIDTHS = (4, 16, 64)


def passes(time: int, width: int, form: str) -> dict[str, Run]:
    torch.manual_seed(0)
    heads = CHANNELS // width
    raw = torch.randn(1, time, heads, dtype=torch.complex64)
    given = [torch.randn(1, time, heads, width) for _ in range(3)]
    given.append(raw / raw.abs() * raw.abs().sigmoid())
    return operator_runs(partial(torch.ops.gateloop.gate_loop, form=form), given)


def measure(time: int, width: int, rounds: int) -> dict[tuple[str, str], float]:
    """Milliseconds of (form, pass)."""
    contenders = {
        (form, which): partial(seconds_of, run, 0.02)
        for form in FORMS
        for which, run in passes(time, width, form).items()
    }
    return {
        key: 1e3 * min(seconds)
        for key, seconds in interleave(contenders, rounds, budget=20).items()
    }


def cell(values: dict[tuple[str, str], float], form: str) -> str:
    return " | ".join(f"{values[form, which]:.3g}" for which in ("forward", "forward + backward"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "release")
    chosen = parser.parse_args()
    torch.ops.load_library(chosen.build / "lib" / "libgateloop_ops.so")
    columns = [f"{form}{more}" for form in FORMS for more in (", forward", ", with backward")]
    print("| T | K = V | " + " | ".join(columns) + " |")
    print("|---:" * (2 + len(columns)) + "|")
    for width in WIDTHS:
        for time in STEPS:
            values = measure(time, width, chosen.rounds)
            print(
                f"| {time} | {width} | {' | '.join(cell(values, f) for f in FORMS)} |", flush=True
            )


if __name__ == "__main__":
    main()
