"""Runs in trackers, read back by the trackers' own readers."""

import functools
import html
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small_runs
from small_runs import MODEL, PARAMETERS, SAMPLE, STEPS, begin_anew, full_line, write_run

from gateloop_cpp import _runs, track
from gateloop_cpp._runs import MARK, NAMES

ROOT = Path(__file__).resolve().parents[2]
write_steps = functools.partial(small_runs.write_steps, line=full_line)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory with no step made yet."""
    return write_run(tmp_path / "runs" / "small")


def scalars(step: int) -> dict[str, float]:
    """Of the record of a step, by the trackers' names."""
    values = json.loads(full_line(step))
    diagnostics = values.pop("diagnostics", {"layers": []})
    for name in ("step", "sample", "sample_prime"):
        values.pop(name, None)
    named = {NAMES[name]: value for name, value in values.items()}
    for index, layer in enumerate(diagnostics["layers"]):
        for name, value in layer.items():
            path = f"layers/{index}/{name}"
            if isinstance(value, list):
                quantiles = zip(("q05", "q50", "q95"), value, strict=True)
                named |= {f"{path}/{quantile}": each for quantile, each in quantiles}
            else:
                named[path] = value
    return {name: value for name, value in named.items() if value is not None}


SCALARS = {step: scalars(step) for step in range(1, STEPS + 1)}
EXPECTED = {
    name: {step: values[name] for step, values in SCALARS.items() if name in values}
    for name in {name for values in SCALARS.values() for name in values}
}


def of_run(out: Path) -> Path:
    (folder,) = out.glob("small-*")
    return folder


def in_tensorboard(out: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(of_run(out)), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    texts = events.Tensors("sample/text_summary")
    assert [text.step for text in texts] == [10, 20, 30, 40]
    assert texts[0].tensor_proto.string_val[0].decode() == SAMPLE
    shown = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert f'"parameters": {PARAMETERS}' in shown
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def wandb_records(file: Path) -> list[dict[str, Any]]:
    """By W&B's own reader. A killed process leaves an empty file, or one that ends anywhere."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def in_wandb(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Of all offline folders of the run, in order: W&B keeps the first value of each step."""
    found: dict[str, dict[int, float]] = {}
    configs, samples = [], {}
    for file in sorted((out / "wandb").glob("offline-run-*/run-0123abcd-*.wandb")):
        records = wandb_records(file)
        configs += [record["run"]["config"]["update"] for record in records if "run" in record]
        for items in (record["history"]["item"] for record in records if "history" in record):
            for name, value in items.items():
                is_own = name.startswith("_") or f"{name.partition('.')[0]}._type" in items
                if isinstance(value, int | float) and not is_own:
                    found.setdefault(name, {}).setdefault(items["_step"], value)
            if items.get("sample._type") == "html-file":
                page = file.parent / "files" / items["sample.path"]
                samples[items["_step"]] = page.read_text(encoding="utf-8")
    assert configs
    for config in configs:
        assert config["model"] == MODEL
        assert config["training"]["steps"] == STEPS
        assert config["parameters"] == PARAMETERS
    assert sorted(samples) == [10, 20, 30, 40]
    assert all(html.escape(SAMPLE) in page for page in samples.values())
    return {name: sorted(values.items()) for name, values in found.items()}


def of_mlflow() -> Any:
    """The one run."""
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    (experiment,) = [e for e in client.search_experiments() if e.name == "gateloop"]
    (found,) = client.search_runs([experiment.experiment_id])
    return found


def in_mlflow(out: Path) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    found = of_mlflow()
    params = found.data.params
    assert params["model.dim"] == "8"
    assert params["training.steps"] == str(STEPS)
    assert params["parameters"] == str(PARAMETERS)
    samples = {file.path for file in client.list_artifacts(found.info.run_id, "sample")}
    assert samples == {f"sample/{step}.txt" for step in (10, 20, 30, 40)}
    for path in samples:
        kept = client.download_artifacts(found.info.run_id, path)
        assert Path(kept).read_text(encoding="utf-8") == SAMPLE
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }


READERS = {"tensorboard": in_tensorboard, "wandb": in_wandb, "mlflow": in_mlflow}


@pytest.fixture(params=READERS)
def to(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    name: str = request.param
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    # Its other stores need packages that its small distribution lacks.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return name


@pytest.fixture
def start(run: Path, to: str, tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts a follower of the run."""
    started: list[subprocess.Popen[bytes]] = []

    def start() -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "gateloop_cpp.track", str(run)]
        flags = ["--to", to, "--out", str(tmp_path / "out")]
        environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
        started.append(subprocess.Popen([*command, *flags], env=environment))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def assert_whole(found: dict[str, list[tuple[int, float]]]) -> None:
    assert EXPECTED.keys() >= set(NAMES.values())
    assert found.keys() == EXPECTED.keys()
    for name, values in EXPECTED.items():
        steps = [step for step, _ in found[name]]
        assert steps == sorted(set(steps))  # each once
        assert dict(found[name]) == pytest.approx(values, rel=1e-6)


Start = Callable[[], subprocess.Popen[bytes]]


@pytest.mark.long
def test_history(run: Path, to: str, start: Start, tmp_path: Path) -> None:
    write_steps(run, 1, STEPS)
    assert start().wait(timeout=90) == 0
    assert_whole(READERS[to](tmp_path / "out"))


def test_a_live_run_and_a_follower_that_is_killed(
    run: Path, to: str, start: Start, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_steps(run, 1, 15)
    follower = start()
    wait_until_sent(15, to, out, follower)
    follower.send_signal(signal.SIGKILL)
    follower.wait(timeout=90)
    write_steps(run, 16, 25)
    follower = start()
    write_steps(run, 26, STEPS)
    assert follower.wait(timeout=90) == 0
    assert_whole(READERS[to](out))


def has_arrived(step: int, to: str, out: Path) -> bool:
    """As far as it shows from outside."""
    if to == "wandb":  # which holds back what fills no block of its file, for a process of its own
        return bool(list((out / "wandb").glob("offline-run-*/*.wandb")))
    if to == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        if not list(out.glob("small-*")):
            return False
        events = EventAccumulator(str(of_run(out))).Reload()
        known = MARK in events.Tags()["scalars"]
        return known and events.Scalars(MARK)[-1].step == step
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("gateloop")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    ids = [found.info.run_id for found in runs if MARK in found.data.metrics]
    return any(client.get_metric_history(run, MARK)[-1].step == step for run in ids)


def wait_until_sent(step: int, to: str, out: Path, follower: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while not has_arrived(step, to, out):
        assert follower.poll() is None
        assert time.monotonic() < deadline, f"step {step} did not arrive"
        time.sleep(0.2)


def test_a_run_need_not_be_named_in_utf_8(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tensorboard")
    run = write_run(tmp_path / os.fsdecode(b"bad\xff") / os.fsdecode(b"run\xff"))
    write_steps(run, 1, STEPS)
    arguments, out = [str(run), "--to", "tensorboard"], tmp_path / "out"
    assert track.main([*arguments, "--out", str(out)]) == 0
    (folder,) = out.iterdir()
    assert folder.name.startswith(r"run\xff-") and list(folder.iterdir())
    assert track.main(arguments) == 1
    refused = "track: --to tensorboard takes names in UTF-8 alone, got "
    assert capsys.readouterr().err.startswith(refused)


def begun_otherwise(run: Path, command: str) -> Path:
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    config["provenance"][0]["command"] = [command]
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return run


def tracked_runs(to: str, out: Path) -> int:
    if to == "tensorboard":
        return len(list(out.glob("small-*")))
    if to == "wandb":
        return len({file.name for file in (out / "wandb").glob("offline-run-*/*.wandb")})
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("gateloop")
    assert experiment is not None
    return len(client.search_runs([experiment.experiment_id]))


def test_runs_of_one_name_and_one_model_stay_apart(to: str, tmp_path: Path) -> None:
    runs = [begun_otherwise(write_run(tmp_path / seed / "small"), seed) for seed in "ab"]
    for run in runs:
        write_steps(run, 1, STEPS)
    assert track.main([*map(str, runs), "--to", to, "--out", str(tmp_path / "out")]) == 0
    assert tracked_runs(to, tmp_path / "out") == len(runs)


def test_a_run_begun_anew_is_another_one(to: str, run: Path, tmp_path: Path) -> None:
    with track.opened([run], to, tmp_path / "out") as (follower,):
        write_steps(run, 1, 9)
        follower.advance()
        begin_anew(run, seed=1)
        write_steps(run, 1, STEPS)
        follower.advance()
        assert follower.is_done
    assert tracked_runs(to, tmp_path / "out") == 2
    with track.opened([run], to, tmp_path / "out") as (follower,):
        if to != "wandb":  # offline it cannot tell
            assert follower.tracker.last_step() == STEPS


@pytest.mark.parametrize("to", ["mlflow"], indirect=True)
def test_mlflow_gets_the_parameters_that_a_killed_follower_left_out(
    to: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    write_steps(run, 1, STEPS)
    monkeypatch.setattr(track, "MLFLOW_BATCH", 3)
    with monkeypatch.context() as dying:
        real, calls = MlflowClient.log_batch, itertools.count()

        def log_batch(*arguments: Any, **named: Any) -> None:
            if next(calls) > 0:
                raise KeyboardInterrupt
            real(*arguments, **named)

        dying.setattr(MlflowClient, "log_batch", log_batch)
        assert track.main([str(run), "--to", to, "--out", str(tmp_path)]) == 130
    assert len(of_mlflow().data.params) == 3
    assert track.main([str(run), "--to", to, "--out", str(tmp_path)]) == 0
    assert_whole(in_mlflow(tmp_path))
    assert len(of_mlflow().data.params) == len(MODEL) + 5 + 1  # training, parameters


@pytest.mark.parametrize("to", ["mlflow"], indirect=True)
def test_mlflow_shows_a_run_under_way_as_such(to: str, run: Path, tmp_path: Path) -> None:
    arguments = [str(run), "--to", to, "--out", str(tmp_path), "--once"]
    write_steps(run, 1, 15)
    assert track.main(arguments) == 0
    assert of_mlflow().info.status == "RUNNING"
    write_steps(run, 16, STEPS)
    assert track.main(arguments) == 0
    assert of_mlflow().info.status == "FINISHED"


def test_a_finished_run_that_was_sent_is_done(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    write_steps(run, 1, STEPS)
    for _ in range(2):  # the second would wait for ever
        assert track.main([str(run), "--to", "tensorboard", "--out", str(tmp_path / "out")]) == 0


def test_errors_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").write_text("{}", encoding="utf-8")
    assert track.main([str(run), "--to", "tensorboard", "--once"]) == 1
    assert capsys.readouterr().err.startswith(
        f"track: {run / 'config.json'}: not the configuration"
    )
    assert track.main([str(tmp_path / "none"), "--to", "tensorboard"]) == 1
    assert "none: no such folder; expected a run's directory" in capsys.readouterr().err


def test_a_folder_of_runs_and_what_happens_to_one_of_them(
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One vanishes, another's log breaks: the third is followed to its end."""
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(_runs, "GONE_SECONDS", 0)
    broken, away = write_run(run.parent / "broken"), write_run(run.parent / "away")
    for each in (run, broken, away):
        write_steps(each, 1, 3)

    def go_on(_: float) -> None:
        if away.exists():
            shutil.rmtree(away)
            (broken / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
            write_steps(run, 4, STEPS)

    monkeypatch.setattr(time, "sleep", go_on)
    assert track.main([str(run.parent), "--to", "tensorboard"]) == 1
    out = run.parent / "tensorboard"
    assert_whole(in_tensorboard(out))
    assert len(list(out.iterdir())) == 3
    problems = capsys.readouterr().err.splitlines()
    assert problems[0] == f"track: {away}: gone before it was finished"
    assert problems[1].startswith(f"track: {broken / 'metrics.jsonl'}")
    assert len(problems) == 2
