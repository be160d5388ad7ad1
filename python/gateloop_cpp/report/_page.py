"""The page of a report: HTML by a template, with its script, style and data inside."""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gateloop_cpp import _histories, _pages
from gateloop_cpp._histories import History
from gateloop_cpp.report import _curves, _groups, _layers
from gateloop_cpp.report._groups import Group

# Of the browser: nothing is fetched from anywhere, whatever the page holds.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)


def render(groups: Sequence[Group], problems: Sequence[str] = ()) -> str:
    """problems: why runs are left out."""
    histories = [history for group in groups for history in group.histories]
    template = _environment().from_string(_text("page.html"))
    return template.render(
        policy=POLICY,
        style=Markup(_text("page.css")),
        script=Markup(_text("page.js")),
        plotly=Markup(_plotly()),
        data=Markup(in_script(_data(groups))),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        groups=groups,
        problems=[_pages.as_text(problem) for problem in problems],
        histories=histories,
        least_memory=_histories.LEAST_MEMORY,
        far=f"{_histories.FAR:g}",
        differing=_groups.differing_options(histories),
        options=_groups.flat_options,
        configuration=lambda history: json.dumps(
            history.run.config | {"machine": history.run.machine}, indent=2, ensure_ascii=False
        ),
        final=lambda history: history.final,
        best=lambda history: history.best and history.best.bits_per_byte,
        speed=lambda history: history.bytes_per_second,
    )


def in_script(data: object) -> str:
    """JSON that ends no script element and opens none: `<` is written as an escape."""
    return json.dumps(data, allow_nan=False).replace("<", "\\u003c")


def _data(groups: Sequence[Group]) -> dict[str, Any]:
    histories = [history for group in groups for history in group.histories]
    panels = [_curves.panel(panel, groups) for panel in _curves.PANELS]
    axes = _histories.axes(histories)
    return {
        "groups": [{"name": group.name, "runs": len(group.histories)} for group in groups],
        "axes": [{"name": axis.name, "label": axis.label, "title": axis.title} for axis in axes],
        "limits": {"firstShare": _histories.FIRST_SHARE, "far": _histories.FAR},
        "panels": [panel for panel in panels if any(line["y"] for line in panel["lines"])],
        "samples": [
            {"run": history.name, "samples": samples}
            for history in histories
            if (samples := _samples(history))
        ],
        "layers": [
            {"run": history.name, "depth": _layers.depth(history), "panels": layer_panels}
            for history in histories
            if (layer_panels := _layers.panels(history, axes))
        ],
    }


def _samples(history: History) -> list[dict[str, Any]]:
    return [
        {
            "step": record.step,
            "prime": record.texts.get("sample_prime", ""),
            "text": record.texts["sample"],
        }
        for record in history.records
        if "sample" in record.texts
    ]


def _environment() -> Environment:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"count": _count, "bits": _bits, "si": _si, "duration": _histories.clock}
    return environment


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script")


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _bits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _si(value: float | None) -> str:
    return "–" if value is None else _histories.si(value)
