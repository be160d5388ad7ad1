"""Show the runs of ``gateloop train`` in TensorBoard, Weights & Biases or MLflow.

    gateloop track runs/quick --to tensorboard    # then: tensorboard --logdir runs

A folder of runs stands for all in it. Reads a run's metrics.jsonl and config.json, which stay the
record; the trainer needs none of these packages. A run under way is followed until it is finished
or gone; Ctrl-C ends following, not the run. Started again, it goes on after what the tracker holds
already.

Scalars have the step as their step: train/bits_per_byte, train/gradient_norm, train/learning_rate,
validation/bits_per_byte, validation/final_bits_per_byte, speed/tokens_per_second,
speed/elapsed_seconds, and where the run has diagnostics such as layers/0/gradient_norm and
layers/0/half_life/q50, the median. Also the configuration, the number of parameters,
and what texts a record has.
"""

import contextlib
import html
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from gateloop_cpp._runs import MARK, Record, Run, readable, run_parser, source

POLL_SECONDS = 1.0
MLFLOW_BATCH = 100  # parameters that its servers take at once


class Tracker(Protocol):
    def last_step(self) -> int:
        """The last step whose whole record an earlier follower left; 0 where there is none."""

    def log(self, record: Record) -> None: ...
    def flush(self) -> None: ...
    def close(self, is_finished: bool) -> None:
        """is_finished: the run, not only following it."""


class TensorBoard:
    """Event files in OUT, a folder of the run's name and the end of its id each."""

    def __init__(self, run: Run, out: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._run = run
        self._folder = out / f"{run.name}-{run.id[-8:]}"
        self._last = self._last_step()
        self._writer: Any = SummaryWriter(str(self._folder))
        if self._last == 0:
            shown = json.dumps(run.config, indent=2, ensure_ascii=False)
            self._writer.add_text("config", f"```json\n{shown}\n```", 0, walltime=run.began)

    def _last_step(self) -> int:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        if not self._folder.is_dir():
            return 0
        events = EventAccumulator(str(self._folder), size_guidance={"scalars": 0})
        events.Reload()
        tags: list[str] = events.Tags()["scalars"]
        steps = [event.step for event in events.Scalars(MARK)] if MARK in tags else []
        return max(steps, default=0)

    def last_step(self) -> int:
        return self._last

    def log(self, record: Record) -> None:
        when = self._run.began + record.elapsed_seconds
        for name, text in record.texts.items():
            self._writer.add_text(name, text, record.step, walltime=when)
        for name, value in record.scalars.items():
            self._writer.add_scalar(name, value, record.step, walltime=when)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, is_finished: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project "gateloop", under its id; WANDB_* set the rest."""

    def __init__(self, run: Run, out: Path) -> None:
        import wandb

        out.mkdir(parents=True, exist_ok=True)
        project = os.environ.get("WANDB_PROJECT", "gateloop")
        self._html = wandb.Html
        self._run: Any = wandb.init(
            project=project, id=run.id, name=run.name, dir=str(out), config=run.config,
            resume="allow", reinit="create_new",
        )  # fmt: skip

    def last_step(self) -> int:
        # The next step that it takes. Offline what earlier followers sent is unknown: then all is
        # written again, into another folder, under the same id.
        return max(0, int(self._run.step) - 1)

    def log(self, record: Record) -> None:
        shown = {name: f"<pre>{html.escape(text)}</pre>" for name, text in record.texts.items()}
        texts = {name: self._html(text) for name, text in shown.items()}
        self._run.log({**texts, **record.scalars}, step=record.step)

    def flush(self) -> None:
        pass  # a process of its own writes at once

    def close(self, is_finished: bool) -> None:
        self._run.finish()


@dataclass
class MlFlow:
    """A run of the experiment "gateloop", found by its id; MLFLOW_* set the rest."""

    run: Run
    out: Path
    _id: str = field(init=False)

    def __post_init__(self) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self.out.mkdir(parents=True, exist_ok=True)
        database = f"sqlite:///{(self.out / 'mlflow.db').resolve()}"
        uri = os.environ.get("MLFLOW_TRACKING_URI") or database
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "gateloop")
        try:
            self._client: Any = MlflowClient(tracking_uri=uri)
            known = self._client.get_experiment_by_name(name)
        except MlflowException as error:  # mlflow-skinny has no databases
            raise ValueError(f"--to mlflow, MLFLOW_TRACKING_URI {uri}: {error}") from error
        experiment = known.experiment_id if known else self._client.create_experiment(name)
        tag = "gateloop.id"
        found = self._client.search_runs([experiment], f"tags.`{tag}` = '{self.run.id}'")
        tags, name = {tag: self.run.id}, self.run.name
        of_it = found[0] if found else self._client.create_run(experiment, tags=tags, run_name=name)
        self._id = of_it.info.run_id
        # An earlier follower may have been killed between two batches.
        missing = [p for p in self._parameters() if p.key not in of_it.data.params]
        for begin in range(0, len(missing), MLFLOW_BATCH):
            self._client.log_batch(self._id, params=missing[begin : begin + MLFLOW_BATCH])

    def _parameters(self) -> list[Any]:
        from mlflow.entities import Param

        return [
            Param(f"{group}.{option}".rstrip("."), str(value))
            for group, values in self.run.config.items()
            for option, value in (values if isinstance(values, dict) else {"": values}).items()
        ]

    def last_step(self) -> int:
        history = self._client.get_metric_history(self._id, MARK)
        return max((metric.step for metric in history), default=0)

    def log(self, record: Record) -> None:
        from mlflow.entities import Metric

        when = round(1e3 * (self.run.began + record.elapsed_seconds))
        metrics = [Metric(name, value, when, record.step) for name, value in record.scalars.items()]
        for name, text in record.texts.items():
            self._client.log_text(self._id, text, f"{name}/{record.step}.txt")
        self._client.log_batch(self._id, metrics=metrics)

    def flush(self) -> None:
        pass  # each record is a call of its own

    def close(self, is_finished: bool) -> None:
        if is_finished:
            self._client.set_terminated(self._id)


TRACKERS: dict[str, Callable[[Run, Path], Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MlFlow,
}


class Follower:
    """One run on its way into one tracker."""

    def __init__(self, folder: Path, to: str, out: Path) -> None:
        self.source = source(folder)
        self.problem = ""  # why it is no longer followed
        self._to, self._out = to, out
        self._open()

    def _open(self) -> None:
        try:
            self.tracker: Tracker = TRACKERS[self._to](self.source.run, self._out)
        except UnicodeEncodeError as error:
            came = repr(error.object)
            raise ValueError(f"--to {self._to} takes names in UTF-8 alone, got {came}") from error
        self._sent = self.tracker.last_step()

    @property
    def is_done(self) -> bool:
        return self.source.log.is_finished

    @property
    def is_over(self) -> bool:
        return self.is_done or bool(self.problem)

    def advance(self) -> None:
        """Sends what is new, unless there is a problem."""
        if self.problem:
            return
        try:
            self._advance()
        except (OSError, ValueError) as error:
            self.problem = str(error)
        if self.source.is_gone and not self.is_done:
            self.problem = f"{self.source.run.folder}: gone before it was finished"

    def _advance(self) -> None:
        """Of a run begun anew all, as another one."""
        before = self.source.run.id
        records = self.source.new_records()
        if self.source.run.id != before:
            self.tracker.close(is_finished=False)
            self._open()
        for record in records:
            if record.step > self._sent:
                self.tracker.log(record)
        self.tracker.flush()


def follow(followers: Sequence[Follower], once: bool) -> None:
    """Until all runs are finished, gone or unreadable, or once."""
    while True:
        for follower in followers:
            follower.advance()
        if once or all(follower.is_over for follower in followers):
            return
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def opened(folders: Sequence[Path], to: str, out: Path | None) -> Iterator[list[Follower]]:
    followers: list[Follower] = []

    def open_one(folder: Path) -> None:
        followers.append(Follower(folder, to, out or folder.resolve().parent / to))

    try:
        readable(folders, open_one, "track")
        yield followers
    finally:
        for follower in followers:
            follower.tracker.close(follower.is_done)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = run_parser("track", __doc__)
    parser.add_argument("--to", required=True, choices=TRACKERS)
    parser.add_argument("--out", type=Path, help="folder of its files [TO, beside the run]")
    parser.add_argument("--once", action="store_true", help="send what there is, do not follow")
    chosen = parser.parse_args(arguments)
    if importlib.util.find_spec(chosen.to) is None:
        print(
            f"track: --to {chosen.to} needs the package {chosen.to}: pip install {chosen.to}",
            file=sys.stderr,
        )
        return 1
    try:
        with opened(chosen.runs, chosen.to, chosen.out) as followers:
            follow(followers, chosen.once)
        problems = [follower.problem for follower in followers if follower.problem]
    except KeyboardInterrupt:
        return 130
    except (OSError, ValueError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"track: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
