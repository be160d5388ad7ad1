"""Runs in trackers, read back by the trackers' own readers."""

import importlib
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from gateloop_cpp import track

ROOT = Path(__file__).resolve().parents[2]
STEPS = 40
SAMPLE = "a sample <b>\nof text"


def line(step: int, last: int = STEPS) -> str:
    values: dict[str, Any] = {
        "step": step,
        "train_bits_per_byte": 8 / step,
        "learning_rate": 1e-3,
        "gradient_norm": 0.5 + step,
        "tokens_per_second": 1000.0,
        "elapsed_seconds": 0.5 * step,
    }
    if step % 10 == 0:
        values["validation_bits_per_byte"] = 7 / step
        values["sample"] = SAMPLE
    if step == last:
        values["final_validation_bits_per_byte"] = 6 / step
    return json.dumps(values) + "\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's directory with no step made yet."""
    folder = tmp_path / "runs" / "small"
    folder.mkdir(parents=True)
    config = {
        "format": 1,
        "id": "0123abcd",
        "model": {"dim": 8},
        "training": {"steps": STEPS},
        "provenance": [{"date": "2026-01-02T03:04:05Z"}],
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(
        {"a": np.zeros((3, 4), np.float32), "b": np.zeros(5, np.float32)},
        folder / "model.safetensors",
    )
    return folder


def write(run: Path, first: int, last: int) -> None:
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(line(step) for step in range(first, last + 1))


EXPECTED = {
    "train/bits_per_byte": {step: 8 / step for step in range(1, STEPS + 1)},
    "train/gradient_norm": {step: 0.5 + step for step in range(1, STEPS + 1)},
    "validation/bits_per_byte": {step: 7 / step for step in range(10, STEPS + 1, 10)},
    "validation/final_bits_per_byte": {STEPS: 6 / STEPS},
}


def in_tensorboard(out: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "small"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    texts = events.Tensors("sample/text_summary")
    assert [text.step for text in texts] == [10, 20, 30, 40]
    assert texts[0].tensor_proto.string_val[0].decode() == SAMPLE
    shown = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert '"parameters": 17' in shown
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def wandb_messages(file: Path) -> Iterator[bytes]:
    """What an offline file holds: LevelDB's log of blocks of 32 KiB after a header of 7 bytes."""
    data, block, header = file.read_bytes(), 1 << 15, 7
    assert data.startswith(b":W&B")
    at, message = header, b""
    while at + header <= len(data):
        if block - at % block < header:
            at += block - at % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0 or at + header + size > len(data):
            return  # a killed process left this
        message += data[at + header : at + header + size]
        at += header + size
        if kind in (1, 4):  # the whole of a message, or its last part
            yield message
            message = b""


def in_wandb(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Of all offline folders of the run, in order: W&B keeps the first value of each step."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    found: dict[str, dict[int, float]] = {}
    for file in sorted((out / "wandb").glob("offline-run-*/run-0123abcd.wandb")):
        for data in wandb_messages(file):
            record = messages.Record()
            record.ParseFromString(data)
            items = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in record.history.item
            }
            for name, value in items.items():
                if isinstance(value, int | float):
                    found.setdefault(name, {}).setdefault(items["_step"], value)
    return {name: sorted(values.items()) for name, values in found.items()}


def in_mlflow(out: Path) -> dict[str, list[tuple[int, float]]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    (experiment,) = [e for e in client.search_experiments() if e.name == "gateloop"]
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params == {"model.dim": "8", "training.steps": "40", "parameters": "17"}
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
    for name, values in EXPECTED.items():
        steps = [step for step, _ in found[name]]
        assert steps == sorted(set(steps))  # each once
        assert dict(found[name]) == pytest.approx(values, rel=1e-6)


Start = Callable[[], subprocess.Popen[bytes]]


def test_history(run: Path, to: str, start: Start, tmp_path: Path) -> None:
    write(run, 1, STEPS)
    assert start().wait(timeout=90) == 0
    assert_whole(READERS[to](tmp_path / "out"))


def test_a_live_run_and_a_follower_that_is_killed(
    run: Path, to: str, start: Start, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write(run, 1, 15)
    follower = start()
    wait_until_sent(15, to, out, follower)
    follower.send_signal(signal.SIGKILL)
    follower.wait(timeout=90)
    write(run, 16, 25)
    follower = start()
    write(run, 26, STEPS)
    assert follower.wait(timeout=90) == 0
    assert_whole(READERS[to](out))


def has_arrived(step: int, to: str, out: Path) -> bool:
    """As far as it shows from outside."""
    if to == "wandb":  # which holds back what fills no block of its file, for a process of its own
        return bool(list((out / "wandb").glob("offline-run-*/*.wandb")))
    if to == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        if not (out / "small").is_dir():
            return False
        events = EventAccumulator(str(out / "small")).Reload()
        known = track.MARK in events.Tags()["scalars"]
        return known and events.Scalars(track.MARK)[-1].step == step
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=os.environ["MLFLOW_TRACKING_URI"])
    experiment = client.get_experiment_by_name("gateloop")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    ids = [found.info.run_id for found in runs if track.MARK in found.data.metrics]
    return any(client.get_metric_history(run, track.MARK)[-1].step == step for run in ids)


def wait_until_sent(step: int, to: str, out: Path, follower: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 90
    while not has_arrived(step, to, out):
        assert follower.poll() is None
        assert time.monotonic() < deadline, f"step {step} did not arrive"
        time.sleep(0.2)


class TestLog:
    @pytest.fixture
    def log(self, run: Path) -> Iterator[track.Log]:
        yield track.Log(run / "metrics.jsonl")

    def test_no_file_yet(self, log: track.Log) -> None:
        assert log.new_records() == []

    def test_a_line_being_written_waits_for_its_end(self, log: track.Log, run: Path) -> None:
        write(run, 1, 2)
        half = line(3)
        with log.path.open("a", encoding="utf-8") as file:
            file.write(half[:30])
        assert [record.step for record in log.new_records()] == [1, 2]
        with log.path.open("a", encoding="utf-8") as file:
            file.write(half[30:])
        assert [record.step for record in log.new_records()] == [3]

    @pytest.mark.parametrize("replaced", [False, True])
    def test_a_log_cut_back_by_resuming(self, log: track.Log, run: Path, replaced: bool) -> None:
        write(run, 1, 9)
        assert len(log.new_records()) == 9
        kept = "".join(line(step) for step in range(1, 6))
        if replaced:
            other = run / "other"
            other.write_text(kept, encoding="utf-8")
            other.replace(log.path)
        else:
            log.path.write_text(kept, encoding="utf-8")
        assert log.new_records() == []
        write(run, 6, 12)
        assert [record.step for record in log.new_records()] == [10, 11, 12]

    def test_what_is_no_record_is_named(self, log: track.Log) -> None:
        log.path.write_text('{"loss": 1}\n', encoding="utf-8")
        with pytest.raises(ValueError, match=r"metrics.jsonl: not a record of a run: .*loss"):
            log.new_records()

    def test_numbers_that_are_not_finite_are_left_out(self, log: track.Log) -> None:
        log.path.write_text('{"step": 1, "gradient_norm": NaN, "train_bits_per_byte": 1}\n')
        (record,) = log.new_records()
        assert record.scalars == {track.MARK: 1}


def test_errors_are_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").write_text("{}", encoding="utf-8")
    assert track.main([str(run), "--to", "tensorboard", "--once"]) == 1
    assert capsys.readouterr().err.startswith(
        f"track: {run / 'config.json'}: not the configuration"
    )
    assert track.main([str(tmp_path / "none"), "--to", "tensorboard"]) == 1
    assert "No such file" in capsys.readouterr().err
