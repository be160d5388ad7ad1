"""Small models of ``gateloop_cpp`` on a synthetic task; run in a process of its own.

    python -m experiments.synthetic '{"task": "memory_horizon", "flags": [], ...}'

prints the outcome as JSON. Flags are NAME=VALUE: arguments of ``gateloop_cpp.Transformer``, and
transition=data|fixed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from benchmarks import environment

from experiments.fixed_transition import make_model
from experiments.frame import ACCURACY, Settings
from experiments.records import ROOT, Cell, Form, Outcome
from experiments.tasks import IGNORED, TASKS, Task

TESTED = 256  # sequences
TEST_SEED = 2**31
PACE_STEPS = 40


class Synthetic:
    """Accuracy on a task's targets, of fresh sequences; also within ranges of the span."""

    def __init__(self, settings: Settings, task: str) -> None:
        self.settings = settings
        self.text = task

    def parameters(self, flags: Sequence[str]) -> int:
        return int(self._call(flags, steps=0)["parameters"])

    def steps(self, form: Form) -> int:
        return TASKS[self.text].steps[form]

    def pace(self, flags: Sequence[str], form: Form) -> float:
        return float(self._call(flags, steps=PACE_STEPS)["seconds"]) / PACE_STEPS

    def run(self, cell: Cell, steps: int) -> Outcome:
        chosen = {"learning_rate": cell.learning_rate, "seed": cell.seed}
        found = self._call(cell.flags, steps=steps, **chosen)
        return Outcome(**found)

    def finish(self, cell: Cell, outcome: Outcome) -> Outcome:
        return outcome

    def remove(self, cell: Cell) -> None:
        pass

    def _call(self, flags: Sequence[str], **options: Any) -> dict[str, Any]:
        asked = {"task": self.text, "flags": list(flags), "threads": self.settings.threads}
        command = [sys.executable, "-m", "experiments.synthetic", json.dumps(asked | options)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=_paths())
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr[-800:]}")
        return dict(json.loads(done.stdout))


def _paths() -> dict[str, str]:
    ours = os.pathsep.join([str(ROOT / "python"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    library = ROOT / "build" / "release" / "lib" / "libgateloop_ops.so"
    return {"GATELOOP_OPS_LIBRARY": str(library)} | os.environ | {"PYTHONPATH": ours}


def train(
    task_name: str,
    flags: Sequence[str],
    steps: int,
    threads: int,
    learning_rate: float = 0.0,
    seed: int = 0,
) -> Outcome:
    """A new batch each step; AdamW, warm-up over a tenth of the steps, then linear to zero."""
    torch.set_num_threads(threads)
    task = TASKS[task_name]
    torch.manual_seed(seed)
    model = make_model(task.num_tokens, flags)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if steps == 0:
        return Outcome(parameters, 0, 0.0, 0, {}, task.definition, "")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=learning_rate or 1e-3, betas=(0.9, 0.98), weight_decay=0.05
    )
    warm = max(1, steps // 10)

    def share(step: int) -> float:
        return min((step + 1) / warm, (steps - step) / max(1, steps - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    generator = torch.Generator().manual_seed(seed)
    began = time.perf_counter()
    for _ in range(steps):
        batch = task.draw(task.batch, generator)
        logits = model(batch.tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    seconds = time.perf_counter() - began
    results = accuracies(model, task, torch.Generator().manual_seed(TEST_SEED))
    tokens = steps * task.batch * task.length
    revision = environment.revision()
    return Outcome(parameters, steps, round(seconds, 2), tokens, results, task.definition, revision)


def accuracies(model: torch.nn.Module, task: Task, generator: torch.Generator) -> dict[str, float]:
    """The share of right targets: of all, and by the span that they need."""
    batch = task.draw(TESTED, generator)
    with torch.no_grad():
        found = torch.cat([model(part).argmax(-1) for part in batch.tokens.split(task.batch)])
    asked = (batch.targets != IGNORED) & (batch.spans > 0)
    right = (found == batch.targets) & asked
    results = {ACCURACY.name: float(right.sum() / asked.sum())}
    for low, high in task.ranges():
        within = asked & (batch.spans > low) & (batch.spans <= high)
        results[f"{low + 1} to {high}"] = float(right[within].double().mean())
    return {name: round(value, 5) for name, value in results.items()}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments.synthetic", description=__doc__)
    parser.add_argument("asked", type=json.loads)
    asked = parser.parse_args().asked
    outcome = train(asked.pop("task"), **asked)
    print(json.dumps(asdict(outcome)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
