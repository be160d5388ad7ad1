"""The curves of a report: for each figure one line a run, and the range over a group's seeds."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateloop_cpp._histories import SPEED, VALIDATION, Axis, History, Point, axes
from gateloop_cpp._runs import MARK
from gateloop_cpp.report._groups import Group

# More points than this to a line show no more on a screen, and make a page slow.
POINTS = 400


@dataclass(frozen=True)
class Panel:
    name: str  # in Record.scalars
    title: str
    unit: str
    digits: str  # d3's format of a value
    is_smoothed: bool
    from_zero: bool = False
    falls: bool = False  # steeply at first


PANELS = [
    Panel(VALIDATION, "Validation loss", "bits per byte", ".4f", False, falls=True),
    Panel(MARK, "Training loss", "bits per byte", ".4f", True, falls=True),
    Panel(SPEED, "Speed", "bytes per second", ".3s", True, from_zero=True),
    Panel("train/gradient_norm", "Gradient norm", "before clipping", ".3g", True),
    Panel("train/learning_rate", "Learning rate", "", ".3g", False),
]


def thinned(points: Sequence[Point], stride: int) -> list[Point]:
    """The first, those of steps that are multiples of `stride`, and the last."""
    ends = {points[0][0].step, points[-1][0].step} if points else set()
    return [p for p in points if p[0].step % stride == 0 or p[0].step in ends]


def _stride(group: Group, panel: Panel) -> int:
    """So that no line has many more than POINTS points, and seeds have the same steps."""
    longest = max(len(history.values(panel.name)) for history in group.histories)
    if longest <= POINTS:
        return 1
    return math.ceil(max(history.last.step for history in group.histories) / POINTS)


def rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _line(
    group: int, name: str, xs: dict[str, list[float]], ys: Sequence[float], **more: object
) -> dict[str, Any]:
    places = {axis: [rounded(x) for x in values] for axis, values in xs.items()}
    return {"group": group, "name": name, "x": places, "y": [rounded(y) for y in ys], **more}


def panel(panel: Panel, groups: Sequence[Group]) -> dict[str, Any]:
    """What the page's script draws; its lines have y of six digits, by every axis."""
    histories = [history for group in groups for history in group.histories]
    used_axes = axes(histories)
    lines: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        stride = _stride(group, panel)
        curves: list[tuple[History, list[Point]]] = []
        for history in group.histories:
            name = panel.name
            points = history.smoothed(name) if panel.is_smoothed else history.values(name)
            curves.append((history, thinned(points, stride)))
        mean = _mean_line(index, group.name, curves, used_axes) if len(curves) > 1 else None
        for history, points in curves:
            xs = {a.name: [a.value(history, record) for record, _ in points] for a in used_axes}
            ys = [y for _, y in points]
            lines.append(_line(index, history.name, xs, ys, alone=mean is None))
        if mean:
            lines.append(mean)
    return {
        "title": panel.title,
        "unit": panel.unit,
        "digits": panel.digits,
        "from_zero": panel.from_zero,
        "falls": panel.falls,
        "lines": lines,
    }


def _mean_line(
    index: int,
    name: str,
    curves: Sequence[tuple[History, Sequence[Point]]],
    used_axes: Sequence[Axis],
) -> dict[str, Any] | None:
    """At the steps that all seeds have: a mean over fewer would jump where one ends."""
    at_step = [{record.step: (record, y) for record, y in points} for _, points in curves]
    shared = sorted(set.intersection(*(set(points) for points in at_step)))
    if not shared:
        return None
    values = [[points[step][1] for points in at_step] for step in shared]
    xs = {
        axis.name: [
            statistics.mean(
                axis.value(history, points[step][0])
                for (history, _), points in zip(curves, at_step, strict=True)
            )
            for step in shared
        ]
        for axis in used_axes
    }
    return _line(
        index, name, xs, [statistics.mean(each) for each in values],
        low=[rounded(min(each)) for each in values],
        high=[rounded(max(each)) for each in values],
        seeds=len(curves),
    )  # fmt: skip
