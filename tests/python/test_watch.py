"""Loss curves in the terminal: what is drawn, once and while runs go on."""

import contextlib
import io
import itertools
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from small_runs import STEPS, begin_anew, write_run, write_steps

from gateloop_cpp import _histories, _runs, watch
from gateloop_cpp._runs import MARK

pytest.importorskip("plotille")
Console = pytest.importorskip("rich.console").Console

ROOT = Path(__file__).resolve().parents[2]
LEAVES_SCREEN = "\x1b[?1049l"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    write_steps(write_run(folder / "first"), 1, STEPS)
    write_steps(write_run(folder / "[red]second", {"steps": None}), 1, 30)
    write_run(folder / "third")
    return folder


@pytest.fixture
def picture(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")

    def draw(*flags: str) -> str:
        assert watch.main([str(runs), *flags]) == 0
        return capsys.readouterr().out

    return draw


def canvas(picture: str) -> list[str]:
    """The rows between the axes, from the top."""
    return [
        line.partition("| ")[2] for line in picture.splitlines() if re.match(r" *\d.* \| ", line)
    ]


def test_a_picture_is_plain_text(picture: Callable[..., str]) -> None:
    text = picture()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) <= 30


def test_rows_of_the_table(picture: Callable[..., str]) -> None:
    table = picture().splitlines()[-4:-1]
    first = "B first 40/40 0.6809 0.1750 0.1500 1k finished"
    assert " ".join(table[1].split()) == first
    assert re.fullmatch(r" A +\[red\]second +30 +\S+ +0.2333 +– +1k +\S.*", table[0].rstrip())
    assert table[2].split() == ["C", "third", "no", "step", "yet"]


def test_letters_are_at_the_validations(picture: Callable[..., str]) -> None:
    rows = canvas(picture())
    # The other run, whose letters would be in the same places, is drawn first.
    marks = [(m.start(), y) for y, row in enumerate(rows) for m in re.finditer("B", row)]
    columns, heights = zip(*sorted(marks), strict=True)
    assert len(columns) == 4
    assert list(heights) == sorted(heights)  # a loss that falls goes down
    distances = [after - before for before, after in itertools.pairwise(columns)]
    assert max(distances) - min(distances) <= 1  # of ten steps each


def test_ticks_are_round(picture: Callable[..., str]) -> None:
    ticks = next(line for line in picture().splitlines() if re.match(r" +\| 0 ", line))
    assert ticks.split() == ["|", "0", "6", "12", "18", "24", "30", "36", "42"]
    assert "(bytes)" in picture("--against", "bytes")
    assert "(seconds)" in picture("--against", "time")


@pytest.mark.parametrize(
    ("values", "ticks", "expected"),
    [
        ([0, 300], 6, (0, 300)),
        ([0, 301], 6, (0, 360)),
        ([2.31, 2.97], 10, (2.24, 3.04)),
        ([1, 1], 5, (1, 1.001)),
    ],
)
def test_limits(values: list[float], ticks: int, expected: tuple[float, float]) -> None:
    assert watch.limits(values, ticks) == pytest.approx(expected)


def test_a_diverged_run_flattens_no_other(runs: Path, picture: Callable[..., str]) -> None:
    def top() -> float:
        return float(re.search(r"^ *(\d+\.\d+) \| ", picture(), re.MULTILINE)[1])  # type: ignore[index]

    before = top()
    write_steps(write_run(runs / "hot"), 1, STEPS, scale=50)
    assert top() < 2 * before


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([[3, 2, 1]], [3, 2, 1]),
        ([[5, 2, 1]], [2, 1]),
        ([[3, 2, 1], [90, 80, 70]], [3, 2, 1]),
        ([[3, 2, 1], [4, 3, 2], []], [3, 2, 1, 4, 3, 2]),
        ([], []),
    ],
)
def test_usual_values(lines: list[list[float]], expected: list[float]) -> None:
    assert _histories.usual(lines) == expected


def test_what_a_run_does(runs: Path) -> None:
    history = _histories.read(runs / "first")
    assert watch.state(history, time.time()) == "finished"
    history.records = history.records[:30]  # in 15 s, of 40 steps
    written = history.log.path.stat().st_mtime
    assert watch.state(history, written + 1) == "0:05 left"
    assert watch.state(history, written + 3723) == "quiet 1:02:03"


def test_a_run_begun_anew_leaves_nothing_of_the_former(runs: Path) -> None:
    history = _histories.read(runs / "first")
    begin_anew(runs / "first", seed=7)
    write_steps(runs / "first", 1, 5, scale=2)
    history.advance()
    assert [value for _, value in history.values(_histories.VALIDATION)] == []
    assert [record.step for record in history.records] == [1, 2, 3, 4, 5]
    assert history.seed == 7


def test_means_of_a_growing_run_are_those_of_a_whole_one(tmp_path: Path) -> None:
    steps = 60 * _histories.LEAST_MEMORY  # the memory has grown
    grown = _histories.read(write_run(tmp_path / "grown"))
    for first in range(1, steps + 1, 100):
        write_steps(tmp_path / "grown", first, first + 99)
        grown.advance()
        assert len(grown.smoothed(MARK)) == len(grown.values(MARK)) == first + 99
    assert grown.smoothed(MARK) == _histories.read(tmp_path / "grown").smoothed(MARK)
    (_, before), (last, mean) = grown.smoothed(MARK)[-2:]
    assert mean - before == pytest.approx((last.scalars[MARK] - before) * 50 / steps)


def test_a_plot_is_drawn_again_where_a_record_came_or_the_size_changed(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []

    def plot(*_: object) -> str:
        drawn.append(1)
        return "plot"

    monkeypatch.setattr(watch.Picture, "_plot", plot)
    histories = [_histories.read(folder) for folder in sorted(runs.iterdir())]
    picture = watch.Picture(histories, "step")

    def plots(width: int = 90) -> int:
        console = Console(file=io.StringIO(), width=width, height=30)
        console.print(picture)
        return len(drawn)

    assert plots() == plots() == 1
    write_steps(runs / "third", 1, 2)
    histories[2].advance()
    assert plots() == plots() == 2
    assert plots(width=100) == 3


class Terminal:
    """A watch that writes to a terminal of its own."""

    def __init__(self, *arguments: Path) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gateloop_cpp.watch", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env=os.environ
            | {"PYTHONPATH": str(ROOT / "python"), "TERM": "xterm", "COLUMNS": "90", "LINES": "30"},
        )
        os.close(theirs)
        self.text = ""

    def read(self) -> bool:
        """Whether there was more."""
        try:
            part = os.read(self._ours, 1 << 16)
        except OSError:  # its other end is closed
            return False
        self.text += part.decode("utf-8", "replace")
        return bool(part)

    def wait_for(self, text: str) -> None:
        while text not in self.text:
            assert self.read(), self.text

    def code(self) -> int:
        while self.read():
            pass
        return self.process.wait(timeout=60)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        with contextlib.suppress(OSError):
            os.close(self._ours)


@pytest.fixture
def terminal(runs: Path) -> Iterator[Terminal]:
    opened = Terminal(runs)
    yield opened
    opened.close()


def test_goes_on_until_all_are_finished(runs: Path, terminal: Terminal) -> None:
    terminal.wait_for("no step yet")
    write_steps(runs / "third", 1, 25)
    terminal.wait_for("25/40")
    write_steps(runs / "third", 26, STEPS)
    write_steps(runs / "[red]second", 31, STEPS)
    assert terminal.code() == 0
    last = terminal.text.rpartition(LEAVES_SCREEN)[2]
    assert last.count("finished") == 3  # it stays when the screen is left


def test_a_run_that_vanishes_or_breaks_ends_nothing(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_runs, "GONE_SECONDS", 0)
    write_steps(write_run(runs / "broken"), 1, 3)
    histories = {folder.name: _histories.read(folder) for folder in sorted(runs.iterdir())}
    states: list[dict[str, str]] = []

    def go_on(_: float) -> None:
        states.append({name: watch.state(h, time.time()) for name, h in histories.items()})
        if len(states) == 1:
            shutil.rmtree(runs / "third")
            (runs / "broken" / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
        elif len(states) == 2:
            write_steps(runs / "[red]second", 31, STEPS)

    monkeypatch.setattr(time, "sleep", go_on)
    picture = watch.Picture(list(histories.values()), "step")
    watch.follow(picture, Console(file=io.StringIO()))
    assert len(states) == 2
    assert (states[0]["third"], states[1]["third"]) == ("no step yet", "gone")
    assert states[1]["broken"] == "unreadable"
    assert "metrics.jsonl: line 1: not a record" in histories["broken"].problem
    assert histories["[red]second"].final is not None


def test_ctrl_c_leaves_the_screen_and_the_picture(terminal: Terminal) -> None:
    terminal.wait_for("no step yet")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.code() == 130
    assert "no step yet" in terminal.text.rpartition(LEAVES_SCREEN)[2]
    assert "Traceback" not in terminal.text


def test_errors_are_one_line(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watch.main([str(runs / "none")]) == 1
    assert capsys.readouterr().err.startswith(f"watch: {runs / 'none'}: no such folder; expected")
    (runs / "first" / "metrics.jsonl").write_text("{}\n", encoding="utf-8")
    assert watch.main([str(runs / "first")]) == 1
    assert "metrics.jsonl: line 1: not a record of a run" in capsys.readouterr().err
    assert watch.main([str(runs)]) == 0
    came = capsys.readouterr()
    assert came.err.startswith(
        f"watch: left out: {runs / 'first' / 'metrics.jsonl'}: line 1: not a record"
    )
    assert came.err.count("\n") == 1
    assert "no step yet" in came.out
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert watch.main([str(runs)]) == 1
    assert capsys.readouterr().err == (
        "watch: needs the packages plotille rich: pip install plotille rich\n"
    )
