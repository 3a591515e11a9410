"""Metrics -> pictures: a chart is a Vega-Lite specification, which vl-convert draws as SVG without a browser.

Colours are variables of the page's style, so that a picture follows its light or dark theme.
"""

import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

import vl_convert

from konic.finetuning.results.intervals import nanmean
from konic.report.words import thinned

MOST_POINTS = 250
"""Points of a line; beyond that, neighbouring iterations are averaged."""
WIDTH, HEIGHT = 420, 190
_NO_CHARACTER = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML has no character for: nearly all control characters, and halves of surrogate pairs."""
COLOURS = [f"var(--line-{number})" for number in range(1, 9)]
_STYLE = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--soft)", "titleColor": "var(--soft)",
        "gridColor": "var(--rule)", "domainColor": "var(--rule)",
        "tickColor": "var(--rule)", "tickCount": 6,
        "titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 11,
    },
    "legend": {"labelColor": "var(--text)", "title": None, "orient": "top", "labelFontSize": 11, "labelLimit": 400},
}  # fmt: skip

_ITERATIONS = {
    "field": "iteration", "type": "quantitative", "title": "iteration", "axis": {"format": "d", "tickMinStep": 1},
}  # fmt: skip
_LINKS_FROM = "https://vega.github.io/vega-datasets/"
"""What Vega puts before a relative link; such a link is one from the page. With `./` first, Vega takes no `a:` for a
scheme."""

Curve = Mapping[int, float]
"""A number by its iteration, NaN where there is none."""
Series = Mapping[str, Curve]
"""Lines by their names."""


def lines(
    series: Series,
    title: str,
    spread: Curve | None = None,
    points: Mapping[int, float] | None = None,
    limit: float | None = None,
) -> str:
    """Draw numbers over the iterations.

    Args:
        series: One or several lines.
        title: What the numbers are, with their unit.
        spread: Half the height of a band around the only line.
        points: Marks by iteration, such as an evaluation.
        limit: A level that is drawn as a dashed line.
    """
    rows = [row for name, values in series.items() for row in _rows(name, values, spread)]
    names = list(series)
    y = {"field": "value", "type": "quantitative", "title": title, "scale": {"zero": False}}
    colour: dict[str, Any] = {"field": "name", "type": "nominal", "scale": {"domain": names, "range": COLOURS}}
    colour["legend"] = {"symbolType": "stroke"} if len(names) > 1 else None
    said = {"field": "said", "type": "nominal"}
    layers: list[dict[str, Any]] = []
    if spread is not None:
        band = {"y": {**y, "field": "low"}, "y2": {"field": "high"}}
        layers.append({"mark": {"type": "area", "opacity": 0.18, "color": COLOURS[0]}, "encoding": band})
    line = {"type": "line", "strokeWidth": 1.8, "interpolate": "linear"}
    layers.append({"mark": line, "encoding": {"y": y, "color": colour}})
    hit = {"type": "point", "filled": True, "size": 80, "opacity": 0}
    layers.append({"mark": hit, "encoding": {"y": y, "description": said}})
    if points:
        marked = [
            {"iteration": at, "value": value, "said": f"held-out prompts after {at} iterations: {_short(value)}"}
            for at, value in points.items()
        ]
        mark = {"type": "point", "filled": True, "size": 70, "color": "var(--mark)"}
        layers.append({"data": {"values": marked}, "mark": mark, "encoding": {"y": y, "description": said}})
    if limit is not None:
        rule = {"type": "rule", "strokeDash": [4, 4], "color": "var(--mark)"}
        layers.append({"data": {"values": [{"value": limit}]}, "mark": rule, "encoding": {"y": y, "x": None}})
    return _draw({"data": {"values": rows}, "encoding": {"x": _ITERATIONS}, "layer": layers}, _described(series, title))


def stacked(series: Series, title: str) -> str:
    """Draw numbers over the iterations on top of each other, such as the times of an iteration's stages."""
    rows = [row for name, values in series.items() for row in _rows(name, values)]
    scale = {"domain": list(series), "range": COLOURS}
    encoding = {
        "x": _ITERATIONS,
        "y": {"field": "value", "type": "quantitative", "title": title, "stack": "zero"},
        "color": {"field": "name", "type": "nominal", "scale": scale},
    }  # fmt: skip
    return _draw({"data": {"values": rows}, "mark": {"type": "area", "opacity": 0.85}, "encoding": encoding},
                 _described(series, title))  # fmt: skip


def frontier(runs: Mapping[str, tuple[Curve, Curve, Mapping[int, str]]], linked: bool = True) -> str:
    """Draw the reward over the KL that was paid for it: a line per run, a point per iteration.

    Args:
        runs: By name, the KL and the reward of each iteration, and links to the checkpoints by iteration.
        linked: Whether a checkpoint leads to its folder.
    """
    rows, saved = [], []
    for name, (kl, reward, links) in runs.items():
        for group in _groups(kl):
            paid, earned = _mean(kl, group), _mean(reward, group)
            if paid is not None and earned is not None:
                said = f"{_label(group)}: {_short(earned)} at {paid:.2f} nats"
                rows.append({"name": name, "order": group[0], "kl": paid, "reward": earned, "said": said})
        for iteration, link in links.items():
            # the weights after iteration k are those that sampled iteration k + 1
            place = min((at for at in kl if at > iteration), default=max(kl))
            if not math.isnan(kl[place] + reward[place]):
                said = f"{link}: {_short(reward[place])} at {kl[place]:.2f} nats"
                href = f"./{quote(os.fsencode(link))}"
                saved.append({"name": name, "kl": kl[place], "reward": reward[place], "said": said, "link": href})
    position: dict[str, Any] = {
        "x": {"field": "kl", "type": "quantitative", "title": "KL paid (nats per response)"},
        "y": {"field": "reward", "type": "quantitative", "title": "mean reward", "scale": {"zero": False}},
    }
    legend = None if len(runs) == 1 else {"symbolType": "circle"}
    scale = {"domain": list(runs), "range": COLOURS}
    position["color"] = {"field": "name", "type": "nominal", "scale": scale, "legend": legend}
    spoken = position | {"description": {"field": "said", "type": "nominal"}}
    path = {"type": "line", "strokeWidth": 1, "opacity": 0.35}
    layers = [
        {"mark": path, "encoding": position | {"order": {"field": "order"}}},
        {"mark": {"type": "point", "filled": True, "size": 28, "opacity": 0.7}, "encoding": spoken},
        {
            "data": {"values": saved},
            "mark": {"type": "point", "shape": "diamond", "size": 130, "strokeWidth": 2, "filled": False},
            "encoding": spoken | ({"href": {"field": "link"}} if linked else {}),
        },
    ]
    about = "Mean reward over the KL paid, a point for each iteration"
    return _draw({"data": {"values": rows}, "layer": layers, "width": 640, "height": 300}, about)


def _rows(name: str, values: Curve, spread: Curve | None = None) -> list[dict[str, Any]]:
    rows = []
    for group in _groups(values):
        value = _mean(values, group)
        if value is None:
            continue
        said = f"{_label(group)}, {name}: {_short(value)}"
        row: dict[str, Any] = {"iteration": group[-1], "value": value, "name": name, "said": said}
        if spread is not None:
            half = _mean(spread, group) or 0.0
            row |= {"low": value - half, "high": value + half}
        rows.append(row)
    return rows


def _groups(values: Curve) -> list[list[int]]:
    """The iterations of a curve in groups of neighbours: one for each point that is drawn."""
    iterations = list(values)
    return [iterations[group.start : group.stop] for group in thinned(len(iterations), MOST_POINTS)]


def _label(group: Sequence[int]) -> str:
    first, last = group[0], group[-1]
    return f"iteration {last}" if first == last else f"iterations {first} to {last}"


def _mean(values: Curve, group: Sequence[int]) -> float | None:
    value = nanmean([values[iteration] for iteration in group])
    return None if math.isnan(value) else value


def _short(value: float) -> str:
    return f"{value:.4g}"


def _described(series: Series, title: str) -> str:
    ends = []
    for name, values in series.items():
        known = [value for value in values.values() if not math.isnan(value)]
        if known:
            ends.append(f"{name} from {_short(known[0])} to {_short(known[-1])}")
    return f"{title}: {'; '.join(ends) or 'no values'}"


def _drawable(value: Any) -> Any:
    """A specification with ? for what SVG has no character for: vl-convert would end the process at it."""
    if isinstance(value, str):
        return _NO_CHARACTER.sub("?", value)
    if isinstance(value, Mapping):
        return {_drawable(key): _drawable(each) for key, each in value.items()}
    return [*map(_drawable, value)] if isinstance(value, list | tuple) else value


def _draw(spec: dict[str, Any], about: str) -> str:
    """Draw a chart. What a mark says becomes its `<title>`, which a browser shows where the pointer rests."""
    whole = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json", "config": _STYLE, "width": WIDTH}
    svg = vl_convert.vegalite_to_svg(_drawable({"height": HEIGHT, **whole, **spec}))
    labelled = r'<path ([^>]*?)aria-label="([^"]*)"([^>]*?)/>'
    svg = re.sub(labelled, r"<path \1\3><title>\2</title></path>", svg)
    svg = re.sub(r' (?:aria-[a-z]+|role)="[^"]*"', "", svg)
    svg = svg.replace(f' xlink:href="{_LINKS_FROM}./', ' href="')
    label = about.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    size = re.search(r'width="([0-9.]+)" height="([0-9.]+)"', svg)
    shown = f' style="max-width:{size[1]}px"' if size else ""
    return re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")>",
        lambda found: f'<svg role="img" aria-label="{label}" {found[1]}{shown}>',
        svg,
        count=1,
    )
