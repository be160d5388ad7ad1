"""The diagnostics of a run's layers as curves: ``gateloop train --diagnostics-every``."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gateloop_cpp._histories import Axis, History
from gateloop_cpp.report._curves import POINTS, rounded, thinned


@dataclass(frozen=True)
class LayerPanel:
    title: str
    unit: str
    name: str  # in Record.scalars, after the layer
    divisor: str = ""
    is_log: bool = False
    has_range: bool = False  # 5th to 95th percentile
    from_zero: bool = False


PANELS = [
    LayerPanel(
        "Half-life of the state", "steps, median", "half_life/q50", is_log=True, has_range=True
    ),
    LayerPanel(
        "Half-life of the simple gate loop in front", "steps, median", "simple_half_life/q50",
        is_log=True, has_range=True,
    ),
    LayerPanel(
        "Phase of the transition", "radians, 95th percentile", "transition_phase/q95",
        has_range=True,
    ),
    LayerPanel("Gradient norm", "before clipping", "gradient_norm", is_log=True),
    LayerPanel("Update", "norm / norm of weights", "update_norm", "weight_norm", is_log=True),
    LayerPanel("Inactive units", "share of hidden units", "inactive_units", from_zero=True),
]  # fmt: skip


def depth(history: History) -> int:
    """Layers that have been diagnosed."""
    names = {name for record in history.records for name in record.scalars}
    count = 0
    while f"layers/{count}/weight_norm" in names:
        count += 1
    return count


def panels(history: History, axes: Sequence[Axis]) -> list[dict[str, Any]]:
    """What the page's script draws; empty where the run has no diagnostics."""
    layers = range(depth(history))
    result = []
    for panel in PANELS:
        lines = [_line(history, panel, layer, axes) for layer in layers]
        if any(line["y"] for line in lines):
            about = {"title": panel.title, "unit": panel.unit}
            scale = {"log": panel.is_log, "from_zero": panel.from_zero}
            result.append({**about, **scale, "lines": lines})
    return result


def _line(history: History, panel: LayerPanel, layer: int, axes: Sequence[Axis]) -> dict[str, Any]:
    prefix = f"layers/{layer}/"
    values = history.values(prefix + panel.name)
    if panel.divisor:
        divisors = ((record, record.scalars.get(prefix + panel.divisor)) for record, _ in values)
        values = [(r, y / d) for (r, y), (_, d) in zip(values, divisors, strict=True) if d]
    stride = 1 if len(values) <= POINTS else math.ceil(history.last.step / POINTS)
    points = thinned(values, stride)
    line: dict[str, Any] = {
        "layer": layer,
        "x": {axis.name: [rounded(axis.value(history, r)) for r, _ in points] for axis in axes},
        "y": [rounded(y) for _, y in points],
    }
    if panel.has_range:
        stem = prefix + panel.name.rpartition("/")[0]
        # A half-life that is infinite is in no record.
        line["range"] = [[r.scalars.get(f"{stem}/{q}") for q in ("q05", "q95")] for r, _ in points]
    return line
