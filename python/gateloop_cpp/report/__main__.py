"""Write one HTML page that compares runs of ``gateloop train``.

    gateloop report runs --out runs        # then open runs/report.html

The page has the differences of configuration, curves against steps, bytes or time, the final
figures and the samples. Runs that differ by their seed alone are one line with its range. The page
holds all it shows, and loads nothing from a network.
"""

import importlib.util
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from gateloop_cpp import _histories, _pages, _runs
from gateloop_cpp._histories import History
from gateloop_cpp.report import _groups, _page

NAME = "report.html"
LIBRARY = "plotly"


def read(folder: Path) -> History:
    """Raises OSError or ValueError naming the file."""
    history = _histories.read(folder)
    if not history.records:
        raise ValueError(f"{history.log.path}: no step in it yet")
    return history


def write(folders: Sequence[Path], out: Path) -> tuple[Path, int]:
    """The page and how many runs are in it. Raises OSError or ValueError naming the file."""
    runs, problems = _runs.readable(folders, read, "report")
    text = _page.render(_groups.groups(runs), problems)
    out.mkdir(parents=True, exist_ok=True)
    page = out / NAME
    _pages.write(page, text)
    return page, len(runs)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _runs.run_parser("report", __doc__)
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="DIR", help=f"folder of {NAME} [.]"
    )
    chosen = parser.parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if importlib.util.find_spec(LIBRARY) is None:
        print(f"report: needs the package {LIBRARY}: pip install {LIBRARY}", file=sys.stderr)
        return 1
    try:
        page, count = write(chosen.runs, chosen.out)
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    print(f"report: {count} {'run' if count == 1 else 'runs'} in {page}: open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(main())
