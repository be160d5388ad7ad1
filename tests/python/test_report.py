"""The page that compares runs: its numbers, and that a browser shows it without an error."""

import html
import json
import re
import shutil
import statistics
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import chromium
import pytest
from small_runs import SAMPLE, STEPS, diagnostics, line, write_run, write_steps

from gateloop_cpp import _histories
from gateloop_cpp.report import _curves, _groups, _page
from gateloop_cpp.report.__main__ import main

pytest.importorskip("plotly")

SCALES = {"small-seed0": 1.0, "small-seed1": 1.2, "wide": 0.9}  # of losses, by run
VALIDATED = (10, 20, 30, 40)
DIGITS = 1e-5  # relative: the page has six digits
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two that differ by their seed, and another."""
    folder = tmp_path / "runs"
    for seed, name in enumerate(("small-seed0", "small-seed1")):
        write_run(folder / name, {"seed": seed, "data": f"elsewhere{seed}", "threads": 1 + seed})
    write_run(folder / "wide", model={"dim": 16})
    for name, scale in SCALES.items():
        write_steps(folder / name, 1, STEPS, scale)
    return folder


def page_of(runs: Path) -> str:
    assert main([str(runs), "--out", str(runs)]) == 0
    return (runs / "report.html").read_text(encoding="utf-8")


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])


def lines_of(page: str, title: str) -> dict[str, Any]:
    (panel,) = [panel for panel in data_of(page)["panels"] if panel["title"] == title]
    return {line["name"]: line for line in panel["lines"]}


class Elements(HTMLParser):
    """What a page refers to, the texts of its table cells, and how many scripts it has."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.scripts = 0
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.links += [
            value or ""
            for name, value in attributes
            if name in {"src", "href", "srcset", "action", "data", "poster", "background"}
        ]
        if tag in {"td", "th"}:
            self.cells.append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in {"td", "th"}:
            self._in_cell = False
            self.cells[-1] = " ".join(self.cells[-1].split())

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.cells[-1] += data


class TestNumbers:
    def test_validation_of_every_run_by_every_axis(self, runs: Path) -> None:
        lines = lines_of(page_of(runs), "Validation loss")
        for name, scale in SCALES.items():
            assert lines[name]["y"] == pytest.approx([scale * 7 / s for s in VALIDATED], DIGITS)
            assert lines[name]["x"]["step"] == [10, 20, 30, 40]
            assert lines[name]["x"]["bytes"] == [24 * s for s in VALIDATED]
            assert lines[name]["x"]["time"] == [5, 10, 15, 20]  # seconds

    def test_seeds_are_one_group_with_their_range(self, runs: Path) -> None:
        page = page_of(runs)
        assert data_of(page)["groups"] == [
            {"name": "wide", "runs": 1},
            {"name": "small", "runs": 2},
        ]
        mean = lines_of(page, "Validation loss")["small"]
        assert mean["seeds"] == 2
        assert mean["low"] == pytest.approx([7 / s for s in VALIDATED], DIGITS)
        assert mean["high"] == pytest.approx([1.2 * 7 / s for s in VALIDATED], DIGITS)
        assert mean["y"] == pytest.approx([1.1 * 7 / s for s in VALIDATED], DIGITS)

    def test_a_mean_ends_where_the_first_of_its_seeds_does(self, runs: Path) -> None:
        log = runs / "small-seed1" / "metrics.jsonl"
        log.write_text("".join(line(step) for step in range(1, 26)), encoding="utf-8")
        lines = lines_of(page_of(runs), "Validation loss")
        assert lines["small"]["x"]["step"] == [10, 20]
        assert lines["small-seed0"]["x"]["step"] == [10, 20, 30, 40]

    def test_seeds_without_a_step_in_common_stand_alone(self, runs: Path) -> None:
        log = runs / "small-seed1" / "metrics.jsonl"
        log.write_text("".join(line(step) for step in range(1, 8)), encoding="utf-8")
        lines = lines_of(page_of(runs), "Validation loss")
        assert "small" not in lines
        assert lines["small-seed0"]["alone"]
        assert not lines_of(page_of(runs), "Training loss")["small-seed0"]["alone"]

    def test_training_loss_is_smoothed(self, runs: Path) -> None:
        values = [8 / step for step in range(1, STEPS + 1)]
        expected = [statistics.mean(values[:n]) for n in range(1, _histories.LEAST_MEMORY + 1)]
        for value in values[_histories.LEAST_MEMORY :]:
            expected.append(expected[-1] + (value - expected[-1]) / _histories.LEAST_MEMORY)
        got = lines_of(page_of(runs), "Training loss")["small-seed0"]["y"]
        assert got == pytest.approx(expected, DIGITS)

    def test_figures(self, runs: Path) -> None:
        cells = Elements(page_of(runs)).cells
        row = cells.index("small-seed1")
        assert cells[row : row + 8] == [
            *("small-seed1", "40", "960", "0:20", "1.3k", "0.1800", "0.2100 step 40", "1k"),
        ]
        row = cells.index("small 2 seeds")
        # Of 0.15 and 0.18, whose standard deviation is 0.03 / sqrt(2).
        assert cells[row + 5] == "0.1650 ± 0.0212"

    def test_differences_of_configuration(self, runs: Path) -> None:
        page = page_of(runs)
        table = page[page.index("Differences of configuration") : page.index("Configurations</h2>")]
        cells = Elements(table).cells
        assert cells[:5] == ["run", "dim", "seed", "data", "threads"]
        assert cells[5:10] == ["wide", "16", "0", "–", "–"]
        assert ["small-seed1", "8", "1", "elsewhere1", "2"] in [cells[10:15], cells[15:20]]

    def test_samples(self, runs: Path) -> None:
        samples = {entry["run"]: entry["samples"] for entry in data_of(page_of(runs))["samples"]}
        assert samples.keys() == SCALES.keys()
        assert [sample["step"] for sample in samples["wide"]] == [10, 20, 30, 40]
        assert samples["wide"][0]["text"] == SAMPLE

    def test_a_run_under_way(self, runs: Path) -> None:
        write_run(runs / "begun", {"steps": 100})
        write_steps(runs / "begun", 1, 7)
        cells = Elements(page_of(runs)).cells
        row = cells.index("begun")
        assert cells[row : row + 7] == ["begun", "7 of 100", "168", "0:04", "1.3k", "–", "–"]

    def test_long_runs_are_thinned_and_keep_their_ends(self, tmp_path: Path) -> None:
        steps = 5003
        write_run(tmp_path / "long", {"steps": steps})
        with (tmp_path / "long" / "metrics.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(line(step, last=steps) for step in range(1, steps + 1))
        curve = lines_of(page_of(tmp_path), "Gradient norm")["long"]
        assert len(curve["y"]) <= _curves.POINTS + 2
        assert (curve["x"]["step"][0], curve["x"]["step"][-1]) == (1, steps)


@pytest.fixture
def diagnosed(runs: Path) -> Path:
    """The log of a run with diagnostics at its first two steps."""
    records = [json.loads(line(step)) for step in range(1, 4)]
    for record in records[:2]:
        record["diagnostics"] = diagnostics(record["step"])
    log = runs / "wide" / "metrics.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return log


class TestLayers:
    def test_curves_of_each_layer(self, runs: Path, diagnosed: Path) -> None:
        (layers,) = data_of(page_of(runs))["layers"]
        assert (layers["run"], layers["depth"]) == ("wide", 2)
        panels = {panel["title"]: panel["lines"] for panel in layers["panels"]}
        # No transition is complex.
        assert list(panels) == [
            "Half-life of the state",
            "Gradient norm",
            "Update",
            "Inactive units",
        ]
        first, second = panels["Half-life of the state"]
        assert (first["x"]["step"], first["x"]["bytes"]) == ([1, 2], [24, 48])
        assert first["y"] == [4, 8]
        assert first["range"] == [[1.5, None], [3, None]]
        assert second["y"] == []
        assert panels["Update"][1]["y"] == [0.005, 0.01]
        assert panels["Inactive units"][0]["y"] == [0.25, 0.25]

    def test_runs_without_have_none(self, runs: Path) -> None:
        assert data_of(page_of(runs))["layers"] == []

    def test_weights_of_norm_zero(self, runs: Path, diagnosed: Path) -> None:
        log = diagnosed.read_text(encoding="utf-8")
        log = log.replace('"weight_norm": 2.0', '"weight_norm": 0')
        diagnosed.write_text(log, encoding="utf-8")
        (layers,) = data_of(page_of(runs))["layers"]
        assert "Update" not in [panel["title"] for panel in layers["panels"]]


class TestGroups:
    def group_names(self, *folders: Path) -> list[str]:
        for folder in folders:
            write_steps(folder, 1, 3)
        return [group.name for group in _groups.groups([_histories.read(f) for f in folders])]

    @pytest.mark.parametrize(
        ("names", "expected"),
        [
            (("a-seed10", "a-seed11"), "a"),
            (("dim-16_s0", "dim-16_s1"), "dim-16"),
            (("gates0", "gates1"), "gates"),
            (("one", "two"), "one and 1 more"),
        ],
    )
    def test_names(self, tmp_path: Path, names: tuple[str, ...], expected: str) -> None:
        folders = [write_run(tmp_path / name, {"seed": i}) for i, name in enumerate(names)]
        assert self.group_names(*folders) == [expected]

    def test_names_of_two_groups_differ(self, tmp_path: Path) -> None:
        folders = [
            write_run(tmp_path / f"a-s{i}", {"seed": i % 2}, {"dim": 8 * (1 + i // 2)})
            for i in range(4)
        ]
        assert self.group_names(*folders) == ["a", "a-s2 and 1 more"]

    def test_folders_of_one_name_are_told_apart(self, tmp_path: Path) -> None:
        folders = [
            write_run(tmp_path / parent / "run", model={"dim": dim})
            for parent, dim in (("a", 8), ("b", 16))
        ]
        assert self.group_names(*folders) == [str(folder) for folder in folders]

    def test_another_length_of_the_run_is_another_group(self, tmp_path: Path) -> None:
        lengths: dict[str, dict[str, object]] = {
            "10 steps": {"steps": 10},
            "20 steps": {"steps": 20},
            "1 minute": {"steps": None, "minutes": 1, "plan": [[1, 10]]},
            "2 minutes": {"steps": None, "minutes": 2, "plan": [[1, 10]]},
            "plan of 10": {"steps": None, "plan": [[1, 30], [5, 10]]},
            "plan of 30": {"steps": None, "plan": [[1, 10], [5, 30]]},
        }
        folders = [write_run(tmp_path / name, training) for name, training in lengths.items()]
        assert self.group_names(*folders) == list(lengths)

    @pytest.mark.parametrize(
        "differing",
        [
            [{"diagnostics_every": 10}, {}],
            [{"threads": 1}, {"threads": 2}],
            [{"steps": None, "minutes": 1, "plan": [[1, total]]} for total in (10, 20)],
            [{"steps": None, "plan": [[1, first], [2, 10]]} for first in (30, 40)],
        ],
    )
    def test_what_changes_no_number_makes_no_group(
        self, tmp_path: Path, differing: list[dict[str, object]]
    ) -> None:
        folders = [
            write_run(tmp_path / f"run-s{seed}", training | {"seed": seed})
            for seed, training in enumerate(differing)
        ]
        assert self.group_names(*folders) == ["run"]


HOSTILE = "</script><script>document.title = 'broken'</script><img src=x onerror=alert(1)>"


@pytest.fixture
def hostile(runs: Path) -> Path:
    """A run whose name, options and samples would change a page that does not escape them."""
    name = "<script>document.title = 'broken'"
    folder = write_run(runs / name, {"data": HOSTILE}, {"gate": HOSTILE, "dim": "<b>%{x}</b>"})
    record = json.loads(line(STEPS)) | {"sample": HOSTILE + "\u2028\x00", "sample_prime": HOSTILE}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    return runs


class TestPage:
    def test_refers_to_nothing_outside(self, hostile: Path) -> None:
        page = page_of(hostile)
        assert Elements(page).links == ["data:,"]  # no icon
        style = page[page.index("<style>") : page.index("</style>")]
        assert "url(" not in style
        assert "@import" not in style
        assert f'content="{_page.POLICY}"' in html.unescape(page)

    def test_hostile_text_is_text(self, hostile: Path) -> None:
        page = page_of(hostile)
        assert Elements(page).scripts == 3  # data, plotly, ours
        samples = {entry["run"]: entry["samples"] for entry in data_of(page)["samples"]}
        assert samples["<script>document.title = 'broken'"][0]["text"] == HOSTILE + "\u2028\x00"
        assert HOSTILE in Elements(page).cells

    def test_is_replaced_whole(self, runs: Path) -> None:
        page_of(runs)
        assert "report.html" in {path.name for path in runs.iterdir()}
        page_of(runs)
        assert not list(runs.glob("*.part"))


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
class TestInBrowser:
    def load(self, page: Path, *flags: str) -> tuple[str, list[str]]:
        """The document when all has run, and what came on the console."""
        assert BROWSER
        result = subprocess.run(
            [
                *(
                    BROWSER,
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--disable-dev-shm-usage",
                ),
                *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000", "--dump-dom"),
                *(f"--user-data-dir={page.parent / 'profile'}", *flags, page.as_uri()),
            ],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
        )
        return result.stdout, [text for text in result.stderr.splitlines() if ":CONSOLE" in text]

    @pytest.mark.parametrize("window", ["1400,1000", "500,900"])
    def test_shows_every_panel_without_an_error(self, hostile: Path, window: str) -> None:
        panels = data_of(page_of(hostile))["panels"]
        document, console = self.load(hostile / "report.html", f"--window-size={window}")
        assert console == []
        assert len(re.findall(r'<div class="plot js-plotly-plot"', document)) == len(panels) == 5
        assert document.count('class="scatterlayer') >= 5
        pressed = re.findall(r'<button[^>]*aria-pressed="true"', document)
        assert len(pressed) == 3 + 1 + 1  # groups, axis, scale
        assert "<title>GateLoop: 4 training runs</title>" in document
        assert f'<output id="sample-step">{STEPS}</output>' in document
        assert html.escape(HOSTILE, quote=False) in document

    def test_shows_the_layers(self, runs: Path, diagnosed: Path) -> None:
        page = page_of(runs)
        document, console = self.load(runs / "report.html")
        assert console == []
        shown = re.findall(r'<div class="plot js-plotly-plot"', document)
        assert len(shown) == len(data_of(page)["panels"]) + len(
            data_of(page)["layers"][0]["panels"]
        )
        assert '<section id="layers">' in document

    def test_a_diverged_run_flattens_no_other(self, runs: Path) -> None:
        write_steps(write_run(runs / "hot", model={"dim": 24}), 1, STEPS, scale=50)
        lines = lines_of(page_of(runs), "Training loss")
        with chromium.opened_page() as page:
            page.load(runs / "report.html")
            begin, end = page.evaluate(
                "document.querySelectorAll('#panels .plot')[1].layout.yaxis.range"
            )
        assert begin < min(lines["wide"]["y"]) < end < min(lines["hot"]["y"])

    def test_layers_have_an_axis_of_their_own(self, runs: Path, diagnosed: Path) -> None:
        page_of(runs)
        with chromium.opened_page() as page:
            page.load(runs / "report.html")
            layouts = page.evaluate(
                "[...document.querySelectorAll('#layers-panels .plot')].map((plot) =>"
                " [plot.layout.xaxis.range[1], plot.layout.yaxis.rangemode])"
            )
        assert [end for end, _ in layouts] == pytest.approx(4 * [1.01 * 2])  # diagnosed at 1 and 2
        assert layouts[-1][1] == "tozero"  # of shares

    def test_more_runs_than_colours_differ_by_dashes(self, tmp_path: Path) -> None:
        for dim in range(8, 18):
            write_steps(write_run(tmp_path / f"dim{dim}", model={"dim": dim}), 1, 3)
        page_of(tmp_path)
        with chromium.opened_page() as page:
            page.load(tmp_path / "report.html")
            for place in ("#legend", ".figures"):
                looks = page.evaluate(
                    f"[...document.querySelectorAll('{place} .swatch')].map(getComputedStyle)"
                    ".map((style) => style.color + style.backgroundImage)"
                )
                assert len(looks) == len(set(looks)) == 10, place
            dashes = page.evaluate(
                "document.querySelector('.plot').data.map((line) => line.line.dash)"
            )
        assert dashes[8:] == ["dash", "dash"]

    def test_long_names_fit_a_phone(self, runs: Path, diagnosed: Path) -> None:
        (runs / "wide").rename(runs / ("a long name" + 20 * "-of-a-run"))
        page_of(runs)
        with chromium.opened_page() as page:
            page.call(
                "Emulation.setDeviceMetricsOverride",
                width=390, height=844, deviceScaleFactor=1, mobile=True,
            )  # fmt: skip
            page.load(runs / "report.html")
            assert page.evaluate("document.documentElement.scrollWidth") == 390
            widest = (
                "Math.max(...[...document.querySelectorAll('tbody th')].map((e) => e.offsetWidth))"
            )
            assert page.evaluate(widest) < 390

    def test_an_error_would_be_seen(self, runs: Path) -> None:
        page = page_of(runs)
        (runs / "broken.html").write_text(page.replace("legend();", "no_such_function();"))
        _, console = self.load(runs / "broken.html")
        assert any("no_such_function is not defined" in text for text in console)

    def test_nothing_is_fetched(self, runs: Path) -> None:
        page = page_of(runs)
        outside = '<img src="https://example.invalid/x.png"></body>'
        (runs / "broken.html").write_text(page.replace("</body>", outside))
        _, console = self.load(runs / "broken.html")
        assert any("Content Security Policy" in text for text in console)


def test_a_name_that_is_no_text(runs: Path) -> None:
    (runs / "wide").rename(runs / "\udcff")
    assert r"\xff" in Elements(page_of(runs)).cells


class TestErrors:
    def failure(self, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
        assert main([str(argument) for argument in arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    def test_no_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "none: no such folder" in self.failure(capsys, tmp_path / "none")
        assert "no run in it; expected a run's directory" in self.failure(capsys, tmp_path)

    def test_a_run_without_a_step(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_run(tmp_path / "run")
        assert "metrics.jsonl: no step in it yet" in self.failure(capsys, tmp_path / "run")
        write_run(tmp_path / "other")
        write_steps(tmp_path / "other", 1, 2)
        assert main([str(tmp_path), "--out", str(tmp_path)]) == 0
        came = capsys.readouterr()
        assert "report: 1 run in" in came.out
        left_out = f"left out: {tmp_path / 'run' / 'metrics.jsonl'}: no step in it yet"
        assert came.err == f"report: {left_out}\n"
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert html.escape(left_out) in page

    @pytest.mark.parametrize(
        "training",
        [{"batch": "many"}, {"seed": [1]}, {"steps": "all"}, {"steps": None, "plan": [3]}],
    )
    def test_a_broken_configuration(
        self, runs: Path, capsys: pytest.CaptureFixture[str], training: dict[str, object]
    ) -> None:
        broken = write_run(runs / "broken<b>", training)
        message = (
            "config.json: no numbers for batch, accumulation, length, steps, minutes, plan and seed"
        )
        assert message in self.failure(capsys, broken)
        page = page_of(runs)
        assert message in capsys.readouterr().err
        assert f"broken&lt;b&gt;/{message}" in page
        assert len(data_of(page)["groups"]) == 2

    def test_a_folder_that_cannot_be_made(
        self, runs: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        where = runs / "wide" / "config.json" / "out"
        assert "config.json" in self.failure(capsys, runs, "--out", where)

    def test_plotly_is_missing(
        self, runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert "report: needs the package plotly: pip install plotly" in self.failure(capsys, runs)
