"""Watch runs of ``gateloop train`` in the terminal: their loss curves, drawn as text.

    gateloop watch runs/quick runs/hybrid

A line is a run's training loss, smoothed; its letter marks the validations. The plot is drawn again
while the runs go on, and ends when all are finished or gone; Ctrl-C ends it, not the runs. With
--once, and where the output is no terminal, it is drawn once.
"""

import importlib.util
import io
import math
import string
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gateloop_cpp import _histories, _runs
from gateloop_cpp._histories import SPEED, VALIDATION, Axis, History
from gateloop_cpp._runs import MARK

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

LIBRARIES = ("plotille", "rich")
REFRESH_SECONDS = 1.0
QUIET_SECONDS = 60.0  # without a step: a run is then marked
COLOURS = ("blue", "red", "green", "magenta", "yellow", "cyan", "white")  # the terminal's own
LETTERS = string.ascii_uppercase + string.ascii_lowercase
LABELS, AROUND = 24, 5  # columns and rows that a plot needs besides its canvas
LEAST_COLUMNS, LEAST_ROWS = 20, 6
TICK_COLUMNS = 10
Line = tuple[list[float], list[float]]
# Of an axis, times a power of 10: the ticks are read easily.
ROUND_STEPS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)


def round_step(least: float) -> float:
    """The smallest round number that is `least` or more."""
    power = 10.0 ** math.floor(math.log10(least))
    tolerance = 1e-9
    return next(r * power for r in ROUND_STEPS if r * power >= least * (1 - tolerance))


def limits(values: Sequence[float], ticks: int) -> tuple[float, float]:
    """Multiples of a round step, so many steps apart, around the values."""
    low, high = min(values), max(values)
    step = round_step(max(high - low, 1e-3) / ticks)
    while (begin := math.floor(low / step) * step) + ticks * step < high:
        step = round_step(1.01 * step)
    return begin, begin + ticks * step


class Picture:
    """Curves and a table of the runs, as rich draws them into the terminal's size."""

    def __init__(self, histories: Sequence[History], axis_name: str) -> None:
        self.histories = histories
        self.axis_name = axis_name
        self._drawn: tuple[Any, str] = (None, "")  # what the plot shows, and the plot

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        begun = [history for history in self.histories if history.values(MARK)]
        if begun:
            rows = console.height - len(self.histories) - 3 - AROUND
            colours = console.color_system is not None
            columns = console.width - LABELS
            # A plot takes longest: it is drawn again only where it is another one.
            shown = (columns, rows, colours, [(h.run.id, len(h.records)) for h in self.histories])
            if shown != self._drawn[0]:
                self._drawn = shown, self._plot(begun, columns, rows, colours)
            yield Text.from_ansi(self._drawn[1], no_wrap=True, overflow="crop")
        yield self._table()

    def _plot(self, begun: Sequence[History], columns: int, rows: int, colours: bool) -> str:
        from plotille import Figure

        (axis,) = [axis for axis in _histories.axes(begun) if axis.name == self.axis_name]
        figure = Figure()
        # Whole distances of ticks, which are then at round numbers.
        figure.width = max(LEAST_COLUMNS, columns // TICK_COLUMNS * TICK_COLUMNS)
        figure.height = max(LEAST_ROWS, rows)
        figure.with_colors, figure.color_mode = colours, "names"
        figure.x_label, figure.y_label = axis.title.split()[0], "bits/byte"
        figure.x_ticks_fkt = lambda value, _: _histories.si(value)
        figure.y_ticks_fkt = lambda value, _: f"{value:.3f}"
        longest = max(axis.value(history, history.last) for history in begun)
        trains: list[Line] = []
        validations: list[Line] = []
        for index, history in enumerate(self.histories):
            colour = COLOURS[index % len(COLOURS)]
            train = curve(history, MARK, axis, 2 * figure.width)
            validation = curve(history, VALIDATION, axis, figure.width)
            figure.plot(*train, lc=colour)
            figure.scatter(*validation, lc=colour, marker=LETTERS[index % len(LETTERS)])
            trains.append(train)
            validations.append(validation)
        figure.set_x_limits(*limits([0, longest], figure.width // TICK_COLUMNS))
        shown = within(trains, longest) + within(validations, longest)
        figure.set_y_limits(*limits(shown, figure.height))
        text: str = figure.show(legend=False)
        return text

    def _table(self) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column()
        table.add_column("run", overflow="ellipsis")
        for column in ("step", "train", "valid", "final", "bytes/s"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column(no_wrap=True)
        for index, history in enumerate(self.histories):
            letter, colour = LETTERS[index % len(LETTERS)], COLOURS[index % len(COLOURS)]
            # As text: a name in brackets is no markup.
            cells = [Text(cell) for cell in row(history)]
            table.add_row(Text(letter, style=colour), *cells)
        return table


def within(lines: Sequence[Line], longest: float) -> list[float]:
    """The values that lie in the plot, of lines of one kind."""
    begin = _histories.FIRST_SHARE * longest
    late = [[y for x, y in zip(*line, strict=True) if x > begin] for line in lines]
    return _histories.usual(late) or _histories.usual([ys for _, ys in lines])


def curve(history: History, name: str, axis: Axis, points: int) -> Line:
    """Positions and values; the training loss smoothed; of many the last in each of `points`."""
    values = history.smoothed(name) if name == MARK else history.values(name)
    stride = max(1, math.ceil(len(values) / points))
    kept = values[(len(values) - 1) % stride :: stride]
    return [axis.value(history, record) for record, _ in kept], [value for _, value in kept]


def row(history: History) -> list[str]:
    """Name, step, losses, speed and what the run does."""
    if not history.records:
        return [history.name, *[""] * 5, state(history, time.time())]
    planned = history.planned_steps
    step = f"{history.last.step:,}" + (f"/{planned:,}" if planned else "")
    validation = history.values(VALIDATION)
    train, speeds = history.smoothed(MARK), history.smoothed(SPEED)
    return [
        history.name,
        step,
        f"{train[-1][1]:.4f}" if train else "–",
        f"{validation[-1][1]:.4f}" if validation else "–",
        "–" if history.final is None else f"{history.final:.4f}",
        _histories.si(speeds[-1][1]) if speeds else "–",
        state(history, time.time()),
    ]


def state(history: History, now: float) -> str:
    if history.problem:
        return "unreadable"
    if history.records and history.final is not None:
        return "finished"
    try:
        quiet = now - history.log.path.stat().st_mtime
    except FileNotFoundError:
        return "gone"
    if not history.records:
        return "no step yet"
    if quiet > QUIET_SECONDS:
        return f"quiet {_histories.clock(quiet)}"
    planned, done = history.planned_steps, history.last.step
    if not planned:
        return "under way"
    return f"{_histories.clock(history.last.elapsed_seconds / done * (planned - done))} left"


def is_over(history: History) -> bool:
    """Whether nothing more is expected of it."""
    is_finished = bool(history.records) and history.final is not None
    return is_finished or bool(history.problem) or history.source.is_gone


def follow(picture: Picture, console: "Console") -> None:
    """Draws until all runs are finished, gone or unreadable."""
    from rich.live import Live

    # On a screen of its own, the picture fits any size that the terminal is given meanwhile.
    with Live(picture, console=console, screen=True, auto_refresh=False) as live:
        while not all(map(is_over, picture.histories)):
            time.sleep(REFRESH_SECONDS)
            for history in picture.histories:
                if not history.problem:
                    try:
                        history.advance()
                    except (OSError, ValueError) as error:
                        history.problem = str(error)
            live.refresh()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _runs.run_parser("watch", __doc__)
    parser.add_argument(
        "--against", choices=("step", "bytes", "time"), default="step", help="the axis [step]"
    )
    parser.add_argument("--once", action="store_true", help="draw what there is, do not follow")
    chosen = parser.parse_args(arguments)
    missing = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        names = " ".join(missing)
        print(f"watch: needs the packages {names}: pip install {names}", file=sys.stderr)
        return 1
    from rich.console import Console

    if isinstance(sys.stdout, io.TextIOWrapper):  # the locale's encoding may lack these characters
        sys.stdout.reconfigure(errors="replace")
    console = Console(highlight=False)
    try:
        histories, _ = _runs.readable(chosen.runs, _histories.read, "watch")
        _histories.make_names_distinct(histories)
        picture = Picture(histories, chosen.against)
        status = 0
        if sys.stdout.isatty() and not chosen.once:
            try:
                follow(picture, console)
            except KeyboardInterrupt:
                status = 130
        console.print(picture)
        for history in histories:
            if history.problem:
                print(f"watch: {history.problem}", file=sys.stderr)
                status = status or 1
    except (OSError, ValueError) as error:
        print(f"watch: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
