"""What is read of a run's directory, also while a trainer writes it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_runs import (
    MODEL,
    PARAMETERS,
    begin_anew,
    diagnostics,
    line,
    write_run,
    write_steps,
)

from gateloop_cpp import _runs


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "runs" / "small")


class TestLog:
    @pytest.fixture
    def log(self, run: Path) -> Iterator[_runs.Log]:
        yield _runs.Log(run / "metrics.jsonl")

    def test_no_file_yet(self, log: _runs.Log) -> None:
        assert log.new_records() == []

    def test_a_line_being_written_waits_for_its_end(self, log: _runs.Log, run: Path) -> None:
        write_steps(run, 1, 2)
        half = line(3)
        with log.path.open("a", encoding="utf-8") as file:
            file.write(half[:30])
        assert [record.step for record in log.new_records()] == [1, 2]
        with log.path.open("a", encoding="utf-8") as file:
            file.write(half[30:])
        assert [record.step for record in log.new_records()] == [3]

    @pytest.mark.parametrize("replaced", [False, True])
    def test_a_log_cut_back_by_resuming(self, log: _runs.Log, run: Path, replaced: bool) -> None:
        write_steps(run, 1, 9)
        assert len(log.new_records()) == 9
        kept = "".join(line(step) for step in range(1, 6))
        if replaced:
            other = run / "other"
            other.write_text(kept, encoding="utf-8")
            other.replace(log.path)
        else:
            log.path.write_text(kept, encoding="utf-8")
        assert log.new_records() == []
        write_steps(run, 6, 12)
        assert [record.step for record in log.new_records()] == [10, 11, 12]

    @pytest.mark.parametrize(
        ("broken", "reason"),
        [
            ('{"loss": 1}', "no 'step'"),
            ("[3]", "not a JSON object"),
            ('{"step": 3', "Expecting ',' delimiter"),
            ('{"step": NaN}', "step must be a whole number of 1 or more, got nan"),
            ('{"step": 1.5}', "step must be a whole number of 1 or more, got 1.5"),
            ('{"step": 0}', "step must be a whole number of 1 or more, got 0"),
            ('{"step": 3, "elapsed_seconds": Infinity}', "elapsed_seconds must be a finite number"),
            ('{"step": 3, "elapsed_seconds": null}', "elapsed_seconds must be a finite number"),
            (f'{{"step": 3, "elapsed_seconds": 1{400 * "0"}}}', "int too large"),
            ('{"step": 3, "diagnostics": {}}', "no 'quantiles'"),
            ("", "Expecting value"),
        ],
    )
    def test_what_is_no_record_is_named(self, run: Path, broken: str, reason: str) -> None:
        log = _runs.Log(run / "metrics.jsonl")
        write_steps(run, 1, 2)
        assert len(log.new_records()) == 2
        write_steps(run, 3, 3)
        with log.path.open("a", encoding="utf-8") as file:
            file.write(broken + "\n")
        expected = f"metrics.jsonl: line 4: not a record of a run: {reason}"
        with pytest.raises(ValueError, match=re.escape(expected)) as raised:
            log.new_records()
        assert broken[:80] in str(raised.value)

    def test_numbers_that_are_not_finite_are_left_out(self, log: _runs.Log) -> None:
        log.path.write_text('{"step": 1, "gradient_norm": NaN, "train_bits_per_byte": 1}\n')
        (record,) = log.new_records()
        assert record.scalars == {_runs.MARK: 1}

    def test_a_log_cut_and_grown_again_is_read_from_its_start(self, log: _runs.Log) -> None:
        log.path.write_text(line(1) + line(2), encoding="utf-8")
        assert len(log.new_records()) == 2
        longer = line(2).replace("0.001", "0.00100")
        with log.path.open("w", encoding="utf-8") as file:  # the same file
            file.write(line(1) + longer + line(3))
        assert [record.step for record in log.new_records()] == [3]

    def test_diagnostics_are_scalars_by_layer(self, log: _runs.Log) -> None:
        record = json.loads(line(3)) | {"diagnostics": diagnostics(3)}
        log.path.write_text(json.dumps(record) + "\n", encoding="utf-8")
        (read,) = log.new_records()
        layers = {name: value for name, value in read.scalars.items() if name[:7] == "layers/"}
        assert layers["layers/0/half_life/q05"] == 4.5
        assert layers["layers/0/half_life/q50"] == 12
        assert "layers/0/half_life/q95" not in layers  # infinite
        assert layers["layers/1/update_norm"] == 0.03
        assert list(read.scalars)[-1] == _runs.MARK

    @pytest.mark.parametrize(
        "broken",
        [3, [], {"layers": []}, {"quantiles": [0.5], "layers": [3]},
         {"quantiles": [0.5], "layers": [{"half_life": [1, 2]}]}],
    )  # fmt: skip
    def test_broken_diagnostics_are_named(self, log: _runs.Log, broken: object) -> None:
        log.path.write_text(json.dumps({"step": 1, "diagnostics": broken}) + "\n")
        with pytest.raises(ValueError, match=r"metrics.jsonl: line 1: not a record of a run"):
            log.new_records()


class TestSource:
    @pytest.mark.parametrize("steps", [3, 9, 12])
    def test_a_run_begun_anew_is_read_from_its_start(self, run: Path, steps: int) -> None:
        source = _runs.source(run)
        write_steps(run, 1, 9)
        assert len(source.new_records()) == 9
        former = source.run
        begin_anew(run, seed=1)
        write_steps(run, 1, steps)
        assert [record.step for record in source.new_records()] == list(range(1, steps + 1))
        assert source.run.id != former.id
        assert source.run.config["training"]["seed"] == 1

    def test_a_resumed_run_is_the_same(self, run: Path) -> None:
        source = _runs.source(run)
        write_steps(run, 1, 9)
        source.new_records()
        former = source.run.id
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        config["provenance"].append({"date": "2026-01-03T00:00:00Z", "processor": "another"})
        (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
        write_steps(run, 10, 12)
        assert [record.step for record in source.new_records()] == [10, 11, 12]
        assert source.run.id == former
        assert source.run.machine == {"processor": "another"}

    def test_a_run_that_vanishes_is_gone_and_may_come_back(
        self, run: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        source = _runs.source(run)
        (run / "config.json").rename(run / "away")
        assert source.new_records() == []
        assert not source.is_gone  # it may be beginning anew
        monkeypatch.setattr(_runs, "GONE_SECONDS", 0)
        assert source.is_gone
        (run / "away").rename(run / "config.json")
        assert source.new_records() == []
        assert not source.is_gone


def test_a_run_is_described(run: Path) -> None:
    read = _runs.read_run(run)
    assert read.name == "small"
    assert read.id.startswith("0123abcd-")
    assert read.config["model"] == MODEL
    assert read.config["parameters"] == PARAMETERS
    assert read.machine == {"processor": "one of a test"}
    assert read.began == 1767323045


def test_a_model_of_another_version_has_no_size(tmp_path: Path) -> None:
    assert (
        "parameters" not in _runs.read_run(write_run(tmp_path / "a", model={"gate": "new"})).config
    )


@pytest.mark.parametrize("text", ["{}", "[]", '{"model": {}', '{"model": {}, "training": 3}'])
def test_what_is_no_configuration_is_named(run: Path, text: str) -> None:
    (run / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config.json: not the configuration of a run"):
        _runs.read_run(run)


class TestFindRuns:
    def test_runs_and_folders_of_runs(self, run: Path, tmp_path: Path) -> None:
        other = write_run(tmp_path / "runs" / "other")
        (tmp_path / "runs" / "no run").mkdir()
        both = [other, run] if other < run else [run, other]
        assert _runs.find_runs([tmp_path / "runs"]) == dict.fromkeys(both, False)
        assert _runs.find_runs([run, tmp_path / "runs"]) == {run: True, other: False}

    def test_a_folder_without_runs_is_named(self, run: Path) -> None:
        (run / "metrics.jsonl").unlink()
        expected = r"; expected a run's directory .* or a folder of such$"
        with pytest.raises(ValueError, match=rf"small: no run in it{expected}"):
            _runs.find_runs([run])
        with pytest.raises(FileNotFoundError, match=rf"none: no such folder{expected}"):
            _runs.find_runs([run / "none"])

    def test_what_cannot_be_read_is_left_out_unless_named(self, run: Path, tmp_path: Path) -> None:
        broken = write_run(tmp_path / "runs" / "broken")
        (broken / "config.json").write_text("{}", encoding="utf-8")
        found, (problem,) = _runs.readable([tmp_path / "runs"], _runs.read_run, "test")
        assert [each.folder for each in found] == [run]
        assert problem.startswith(f"{broken / 'config.json'}: not the configuration of a run")
        for folders in ([broken], [tmp_path / "runs", broken]):
            with pytest.raises(ValueError, match=r"broken.config.json: not the configuration"):
                _runs.readable(folders, _runs.read_run, "test")
        (run / "config.json").write_text("{}", encoding="utf-8")
        with pytest.raises(ValueError, match=r"broken.config.json.*; .*small.config.json"):
            _runs.readable([tmp_path / "runs"], _runs.read_run, "test")
