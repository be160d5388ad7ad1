"""How cost grows with the length of a sequence, as a picture."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.records import Row


def length(problem: str) -> int:
    """T of "operator (B, T, D)"."""
    return int(problem.rpartition("(")[2].split(", ")[1].replace(",", ""))


def growth(rows: Sequence[Row], file: Path) -> None:
    # Only whoever draws needs it.
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "growth"  # equal numbers give an equal file
    from matplotlib import pyplot

    passes = dict.fromkeys(row.which for row in rows if row.group == "growth")
    figure, panels = pyplot.subplots(1, len(passes), figsize=(11, 4.5), sharey=True)
    for panel, which in zip(panels, passes, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            if row.group == "growth" and row.which == which and row.values:
                lines.setdefault(row.contender, []).append((length(row.problem), 1e3 * row.value))
        for name, points in lines.items():
            panel.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
        panel.set(xscale="log", yscale="log", title=which, xlabel="time steps T")
        panel.set_xscale("log", base=2)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("ms, simple_gate_loop on (1, T, 64)")
    panels[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
