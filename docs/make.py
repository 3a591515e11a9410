"""Makes the parts of the documents that follow from the code: `python docs/make.py`.

- the table of docs/metrics.md, from the metrics that `konic.finetuning.results.iteration` declares;
- docs/packages.svg, the packages of konic.finetuning with an arrow from each to what it imports.

A test fails where they are not up to date.
"""

import ast
from html import escape
from itertools import pairwise
from pathlib import Path

from konic.finetuning.results.iteration import METRICS

DOCS = Path(__file__).parent
PACKAGE = DOCS.parent / "src" / "konic" / "finetuning"
TABLE = ("<!-- metrics: made by docs/make.py -->", "<!-- end of metrics -->")
BOX, GAP = (168, 58), (40, 58)

OLD_PLACES = ("callback", "dataset", "reward")
"""Modules that only keep names at the places where konic 0.1 had them."""


def metrics_table() -> str:
    """A row for each metric: name, unit, the stage it comes from, meaning."""
    rows = [f"| `{name}` | {m.unit} | {m.source} | {m.meaning} |" for name, m in METRICS.items()]
    return "\n".join(["| name | unit | from | what it is |", "|---|---|---|---|", *rows])


def imports() -> dict[str, set[str]]:
    """Of every package and module of konic.finetuning, the others that it imports."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if room == "__init__" or room in OLD_PLACES:
            continue
        own = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) and node.module else ""
            parts = module.split(".")
            if parts[:2] == ["konic", "finetuning"] and len(parts) > 2 and parts[2] != room:
                own.add(parts[2])
    return found


def direct(arrows: dict[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that are not implied by a longer way along others."""

    def reach(room: str) -> set[str]:
        return {room}.union(*(reach(other) for other in arrows[room]))

    return {
        room: {o for o in others if not any(o in reach(between) for between in others - {o})}
        for room, others in arrows.items()
    }


def floors(arrows: dict[str, set[str]]) -> dict[str, int]:
    """The floor of each room, 0 at the ground: just above the highest that it imports."""

    def floor(room: str) -> int:
        return max((floor(other) + 1 for other in arrows[room]), default=0)

    return {room: floor(room) for room in arrows}


def routes(arrows: dict[str, set[str]], levels: dict[str, int]) -> list[list[str]]:
    """Every arrow as the places that it passes: a room, a gap `room>other:floor` on each floor between, a room."""
    return [
        [room, *(f"{room}>{other}:{level}" for level in range(levels[room] - 1, levels[other], -1)), other]
        for room, others in arrows.items()
        for other in sorted(others)
    ]


def layout(levels: dict[str, int], ways: list[list[str]]) -> tuple[dict[str, float], float]:
    """The middle of each place on its floor, ordered so that few arrows cross, and the width of the picture."""
    floor_of = levels | {gap: int(gap.rpartition(":")[2]) for way in ways for gap in way[1:-1]}
    rows = [[place for place in floor_of if floor_of[place] == level] for level in range(max(levels.values()) + 1)]
    links: dict[str, list[str]] = {place: [] for place in floor_of}
    for way in ways:
        for high, low in pairwise(way):
            links[high].append(low)
            links[low].append(high)
    middles: dict[str, float] = {}
    for _ in range(8):  # sweeps: every place moves towards the mean of those that it is linked to
        for row in rows:
            known = {p: [middles[o] for o in links[p] if o in middles] for p in row}
            row.sort(key=lambda p: sum(known[p]) / len(known[p]) if known[p] else middles.get(p, 0.0))
            sizes = [GAP[0] + (BOX[0] if place in levels else 0) for place in row]
            left = -sum(sizes) / 2
            for place, size in zip(row, sizes, strict=True):
                middles[place] = left + size / 2
                left += size
    half = max(abs(middle) for middle in middles.values()) + BOX[0] / 2 + GAP[0]
    return {place: middle + half for place, middle in middles.items()}, 2 * half


def describe(room: str) -> str:
    """What goes in and what comes out, from the first line of the docstring."""
    path = PACKAGE / room / "__init__.py" if (PACKAGE / room).is_dir() else PACKAGE / f"{room}.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docstring.split("\n")[0]


def picture() -> str:
    """The packages as boxes on floors, high to low, with arrows down to what they import."""
    arrows = imports()
    levels = floors(arrows)
    ways = routes(direct(arrows), levels)
    middles, width = layout(levels, ways)
    height = (max(levels.values()) + 1) * (BOX[1] + GAP[1]) + GAP[1]

    def top(place: str) -> float:
        level = levels[place] if place in levels else int(place.rpartition(":")[2])
        return height - (level + 1) * (BOX[1] + GAP[1])

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 L8 4 L0 8 z" fill="#6b7280"/></marker></defs>',
        f'<rect width="{width:.0f}" height="{height}" fill="#ffffff"/>',
    ]
    for way in ways:
        path = f"M{middles[way[0]]:.0f} {top(way[0]) + BOX[1]:.0f}"
        for high, low in pairwise(way):
            start, end = top(high) + BOX[1], top(low) - (2 if low in levels else 0)
            bend = (start + end) / 2
            path += f" C{middles[high]:.0f} {bend:.0f} {middles[low]:.0f} {bend:.0f} {middles[low]:.0f} {end:.0f}"
            path += "" if low in levels else f" L{middles[low]:.0f} {top(low) + BOX[1]:.0f}"
        parts.append(f'<path d="{path}" fill="none" stroke="#6b7280" stroke-width="1.4" marker-end="url(#tip)"/>')
    for room in arrows:
        modules = len([path for path in (PACKAGE / room).glob("*.py") if path.stem != "__init__"])
        colour, note = ("#dbeafe", f"{modules} modules") if modules else ("#f3f4f6", "module")
        middle, y = middles[room], top(room)
        parts += [
            f"<g><title>{escape(describe(room))}</title>",
            f'<rect x="{middle - BOX[0] / 2:.0f}" y="{y:.0f}" width="{BOX[0]}" height="{BOX[1]}" rx="7" '
            f'fill="{colour}" stroke="#374151"/>',
            f'<text x="{middle:.0f}" y="{y + 26:.0f}" text-anchor="middle" font-size="17" fill="#111827">{room}</text>',
            f'<text x="{middle:.0f}" y="{y + 45:.0f}" text-anchor="middle" font-size="12" fill="#4b5563">{note}</text>',
            "</g>",
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def with_table(text: str) -> str:
    """A document with the table of metrics between its two marks."""
    before, _, rest = text.partition(TABLE[0])
    _, _, after = rest.partition(TABLE[1])
    return f"{before}{TABLE[0]}\n\n{metrics_table()}\n\n{TABLE[1]}{after}"


def main() -> None:
    """Write both."""
    page = DOCS / "metrics.md"
    page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")
    (DOCS / "packages.svg").write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
