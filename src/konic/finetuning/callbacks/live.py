"""State of a run -> the picture that a terminal or a notebook shows of it; pure, in the colours of the terminal.

It has the terminal's own colour, which reads on light and dark backgrounds; red of its 16 colours needs attention.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.panel import Panel
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.text import printable

_WIDE = 120
"""Columns from which the sample stands beside the numbers."""
_LEAST_HEIGHT = 8
_MOST_HEIGHT = 24
_LINES_ABOVE = 8
"""Lines of the terminal that are left to the printed lines, if it has enough."""
_LONGEST_TEXT = 2_000
_CURVE_LENGTH = 200
_BLOCKS, _BLOCKS_ASCII = "▁▂▃▄▅▆▇█", "_.-=+*%#"
_LABEL = 11
"""Columns of the names at the left."""


@dataclass
class LiveState:
    """What the picture shows; the callback's hooks fill it. Times are those of one monotonic clock, in seconds."""

    settings: dict[str, Any]
    started: float
    phase: str = "starting"
    history: deque[FinetuningIterationResult] = field(default_factory=lambda: deque(maxlen=_CURVE_LENGTH))
    findings: dict[str, int] = field(default_factory=dict)
    """The iteration in which each self-check failed first."""
    best: FinetuningIterationResult | None = None
    """The iteration of the highest mean reward so far."""
    sample: tuple[str, str, float] | None = None
    """Prompt, response, reward."""
    iteration_began: float | None = None
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=10))
    memory_bytes: int = 0
    """The most that the process has used, of the GPU's memory if it uses one."""

    @property
    def total(self) -> int:
        """Number of the last iteration."""
        return int(self.settings["max_iterations"])

    @property
    def done(self) -> int:
        """Iterations done, those before a resume included."""
        return self.history[-1].iteration if self.history else int(self.settings.get("iterations_done", 0))

    def begin_iteration(self, now: float) -> None:
        """Note when an iteration begins."""
        self.iteration_began = now

    def set_sample(self, prompt: str, response: str, reward: float) -> None:
        """Keep one sample, printable and cut; no secret is cut before it is found."""
        texts = (printable(text[: 10 * _LONGEST_TEXT])[:_LONGEST_TEXT] for text in (prompt, response))
        self.sample = (*texts, reward)  # type: ignore[assignment]

    def add(self, result: FinetuningIterationResult, now: float | None = None) -> None:
        """Add an iteration that ended now, or one of an earlier process (None). One that is there already is left."""
        if self.history and result.iteration <= self.history[-1].iteration:
            return
        self.history.append(result)
        for name in result.checks:
            self.findings.setdefault(name, result.iteration)
        if not math.isnan(result.reward_mean) and (self.best is None or result.reward_mean > self.best.reward_mean):
            self.best = result
        if now is not None and self.iteration_began is not None:
            self.durations.append(now - self.iteration_began)
            self.iteration_began = now

    def seconds_left(self, now: float) -> float | None:
        """Estimate of the remaining time, by the last ten iterations and max_minutes; None before the first."""
        if not self.durations or self.iteration_began is None:
            return None
        mean = sum(self.durations) / len(self.durations)
        left = max(0.0, mean * (self.total - self.done) - (now - self.iteration_began))
        most = self.settings.get("max_minutes")
        if most and not self.settings.get("iterations_done"):
            left = min(left, max(0.0, 60 * most - (now - self.started)))
        return left


def draw(state: LiveState, width: int, height: int, now: float, ascii_only: bool = False) -> RenderableType:
    """The picture for a terminal of `width` columns and `height` lines; its height changes only with the terminal's."""
    blocks = _BLOCKS_ASCII if ascii_only else _BLOCKS
    lines_inside = min(max(_LEAST_HEIGHT, height - _LINES_ABOVE), _MOST_HEIGHT, max(3, height - 1)) - 2
    is_wide = width >= _WIDE
    columns = width // 2 if is_wide else width - 4
    most_parts = max(0, lines_inside - (5 if is_wide else 8))
    numbers = list(_numbers(state, columns, now, blocks, most_parts))
    sample = _sample(state)
    body: RenderableType
    if is_wide:
        body = Table.grid(expand=True, padding=(0, 2))
        body.add_column(width=columns)
        body.add_column(ratio=1)
        body.add_row(Group(*numbers), Group(*sample))
    else:
        body = Group(*numbers, *sample)
    used = min(lines_inside, len(numbers) + (0 if is_wide else 4 if height < 36 else 8))
    panel = Panel(
        body,
        title=Text(printable(str(state.settings["model_name"]))[: width // 2], style="bold"),
        subtitle=Text(state.phase),
        title_align="left",
        subtitle_align="right",
        box=box.ASCII if ascii_only else box.ROUNDED,
        height=max(used, min(lines_inside, 8)) + 2,
        width=width,
    )
    return _Ascii(panel) if ascii_only else panel


class _Ascii:
    """A picture with ? in the place of what is not ASCII, so that each line keeps its width."""

    def __init__(self, picture: RenderableType) -> None:
        self._picture = picture

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for segment in console.render(self._picture, options):
            text = segment.text.replace("…", ".")
            yield segment._replace(text="".join(x if x.isascii() else "?" * cell_len(x) for x in text))


def sparkline(values: Iterable[float], width: int, blocks: str = _BLOCKS) -> str:
    """The last `width` values as blocks between their lowest and highest; a space for NaN and infinity."""
    shown = list(values)[-width:]
    finite = [value for value in shown if math.isfinite(value)]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite)
    top = len(blocks) - 1
    level = {value: round((value - low) / span * top) if span > 0 else top // 2 for value in finite}
    return "".join(blocks[level[value]] if math.isfinite(value) else " " for value in shown)


def _numbers(state: LiveState, width: int, now: float, blocks: str, most_parts: int) -> Iterator[Text]:
    """The lines of numbers, each cut to `width` columns."""
    curve = max(8, min(width - 56, 60))
    for line in (
        _progress(state, width, now),
        _reward(state, curve, blocks),
        *_parts(state, curve, blocks, most_parts),
        _kl(state, curve, blocks),
        _measures(state),
        _machine(state),
        _checks(state),
    ):
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
        yield line


def _progress(state: LiveState, width: int, now: float) -> Text:
    """The time left matters most: without room, the bar is left out, and then the time passed."""
    seconds = state.seconds_left(now)
    left = f"{'?' if seconds is None else _clock(seconds)} left"
    times = f"{_clock(now - state.started)} passed, {left}" if width >= 50 else left
    bar = _bar(state.done / max(1, state.total), max(8, width - 60)) if width >= 60 else ""
    return _named("iteration", f"{min(state.done + 1, state.total)} of {state.total}".ljust(14), bar, f"  {times}")


def _reward(state: LiveState, curve: int, blocks: str) -> Text:
    last, best = _last(state), state.best
    if last is None:
        return _named("reward", "after the first iteration")
    text = f"{last.reward_mean:.3f} {'±' if blocks is _BLOCKS else '+/-'} {last.reward_std:.3f}"
    highest = f"  best {best.reward_mean:.3f} (iteration {best.iteration})" if best else ""
    return _named("reward", text.ljust(17), _curve((r.reward_mean for r in state.history), curve, blocks), highest)


def _parts(state: LiveState, curve: int, blocks: str, most: int) -> Iterator[Text]:
    """A line for each reward; where they do not fit, the last line says how many are left out."""
    last = _last(state)
    names = list(last.reward_breakdown) if last else []
    shown = names if len(names) <= most else names[: max(0, most - 1)]
    for name in shown:
        assert last is not None  # noqa: S101
        values = (result.reward_breakdown.get(name, math.nan) for result in state.history)
        label = set_cell_size(printable(name), 20).rstrip()
        yield _named("", f"{last.reward_breakdown[name]:.3f}".ljust(17), _curve(values, curve, blocks), f"  {label}")
    if most and len(shown) < len(names):
        yield _named("", f"and {len(names) - len(shown)} more rewards")


def _kl(state: LiveState, curve: int, blocks: str) -> Text:
    last, settings = _last(state), state.settings
    if last is None:
        return _named("KL", "after the first iteration")
    limits = ("kl_target",) if settings.get("kl_target") else ("kl_budget", "kl_limit")
    limit = next((name for name in limits if settings.get(name)), None)
    values = _curve((result.kl_per_response for result in state.history), curve, blocks)
    text, note = f"{last.kl_per_response:.2f}", "  nats per response"
    if limit is not None:
        share = last.kl_per_response / settings[limit]
        text += f" of {settings[limit]:g}"
        note += f", {limit}"
        values.stylize("red" if share > 0.9 else "")
    return _named("KL", text.ljust(17), values, note)


def _measures(state: LiveState) -> Text:
    last = _last(state)
    if last is None:
        return _named("responses", "after the first iteration")
    return _named(
        "responses",
        f"{last.response_length_mean:.1f} tokens, {last.ended_fraction:.0%} ended, entropy {last.entropy:.2f}, "
        f"clipped {last.clip_fraction:.1%}",
    )


def _machine(state: LiveState) -> Text:
    last = _last(state)
    memory = f"{state.memory_bytes / 2**30:.1f} GiB of memory at most" if state.memory_bytes else ""
    if last is None or not last.total_time_sec:
        return _named("speed", memory or "after the first iteration")
    speed = f"{last.num_samples * last.response_length_mean / last.total_time_sec:.0f} tokens/s"
    return _named("speed", f"{speed}, {last.total_time_sec:.1f} s per iteration, {memory}".rstrip(", "))


def _checks(state: LiveState) -> Text:
    if not state.settings.get("self_checks", True):
        return _named("checks", "off")
    if not state.findings:
        return _named("checks", "no findings")
    found = ", ".join(f"{name} (iteration {iteration})" for name, iteration in reversed(state.findings.items()))
    return _named("checks", Text(printable(found), style="red"))


def _sample(state: LiveState) -> list[Text]:
    """The sample's lines; the response comes last and is cut by the height."""
    if state.sample is None:
        return [_named("sample", "after the first responses")]
    prompt, response, reward = state.sample
    first = _named("sample", f"{reward:+.3f}  ", Text(prompt))
    first.no_wrap, first.overflow = True, "ellipsis"
    return [first, Text(response, overflow="fold")]


def _named(name: str, *parts: str | Text) -> Text:
    return Text.assemble((name.ljust(_LABEL), "bold"), *parts)


def _curve(values: Iterable[float], width: int, blocks: str) -> Text:
    return Text(sparkline(values, width, blocks))


def _bar(share: float, width: int) -> Text:
    full = round(min(1.0, max(0.0, share)) * width)
    return Text("=" * full + "-" * (width - full))


def _last(state: LiveState) -> FinetuningIterationResult | None:
    return state.history[-1] if state.history else None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
