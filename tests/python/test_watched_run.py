"""A run of `gateloop train` itself, in the report, in the terminal and in a tracker."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gateloop_cpp import track, watch
from gateloop_cpp._runs import NAMES
from gateloop_cpp.report.__main__ import main as report

STEPS, EVERY, DEPTH = 20, 10, 2
FLAGS = (
    *("--preset", "enwik8", "--dim", "16", "--depth", str(DEPTH), "--gate-loop-heads", "16"),
    *("--length", "16", "--batch", "4", "--accumulation", "1", "--threads", "1"),
    *("--steps", str(STEPS), "--validation-windows", "4", "--final-windows", "4"),
    *("--sample-prime", "8", "--sample-length", "16", "--diagnostics-every", str(EVERY)),
    *("--sample-every", str(EVERY), "--validate-every", str(EVERY)),
)


@pytest.fixture(scope="module")
def run(build_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").write_text(1000 * "The gate loops over time, and forgets.\n")
    data, out = folder / "text", folder / "trained"
    command = (build_dir / "gateloop", "train", "--data", data, "--out", out, *FLAGS)
    result = subprocess.run(command, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="module")
def records(run: Path) -> dict[int, dict[str, Any]]:
    """Of steps 10 and 20, which have all."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == STEPS
    whole = {record["step"]: record for record in map(json.loads, lines) if "sample" in record}
    assert sorted(whole) == [EVERY, STEPS]
    for record in whole.values():
        assert record["sample"]
        assert len(record["diagnostics"]["layers"]) == DEPTH
    return whole


@pytest.fixture(scope="module")
def final(records: dict[int, dict[str, Any]]) -> float:
    loss: float = records[STEPS]["final_validation_bits_per_byte"]
    return loss


def test_report(run: Path, records: dict[int, dict[str, Any]], final: float) -> None:
    pytest.importorskip("plotly")
    assert report([str(run), "--out", str(run.parent)]) == 0
    page = (run.parent / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data = json.loads(found[1])
    assert re.search(rf"<td[^>]*>\s*{final:.4f}\s*</td>", page)
    (layers,) = data["layers"]
    panels = {panel["title"]: panel["lines"] for panel in layers["panels"]}
    halves = panels["Half-life of the state"]
    assert len(halves) == DEPTH
    for index, line in enumerate(halves):
        assert line["x"]["step"] == [EVERY, STEPS]
        kept = [record["diagnostics"]["layers"][index]["half_life"] for record in records.values()]
        assert line["y"] == pytest.approx([values[2] for values in kept], rel=1e-5)  # the medians
    (entry,) = data["samples"]
    shown = {sample["step"]: sample["text"] for sample in entry["samples"]}
    assert shown == {step: record["sample"] for step, record in records.items()}


def test_watch(
    run: Path,
    final: float,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("plotille")
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "100")
    assert watch.main([str(run), "--once"]) == 0
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "trained" in line]
    assert f"{STEPS}/{STEPS}" in row
    assert f"{final:.4f}" in row
    assert row.rstrip().endswith("finished")


def test_track(run: Path, tmp_path: Path, records: dict[int, dict[str, Any]], final: float) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert track.main([str(run), "--to", "tensorboard", "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    (event,) = events.Scalars(NAMES["final_validation_bits_per_byte"])
    assert (event.step, event.value) == (STEPS, pytest.approx(final, rel=1e-6))
    for index in range(DEPTH):
        medians = {e.step: e.value for e in events.Scalars(f"layers/{index}/half_life/q50")}
        assert medians == pytest.approx(
            {step: r["diagnostics"]["layers"][index]["half_life"][2] for step, r in records.items()}
        )
    texts = {
        text.step: text.tensor_proto.string_val[0].decode()
        for text in events.Tensors("sample/text_summary")
    }
    assert texts == {step: record["sample"] for step, record in records.items()}
