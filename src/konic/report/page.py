"""Runs -> one HTML page that needs no network: pictures, texts, style and script are all inside."""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from konic import __version__
from konic.finetuning.results.intervals import nanmean
from konic.finetuning.system.files import unwritable, write_text
from konic.report import charts
from konic.report.replay import OLDER, Replay, chosen_of
from konic.report.run import PART, Run, as_number
from konic.report.words import duration, outcome, part_means, suspicions, thinned

MOST_PAIRS = 200
"""Held-out prompts that are shown with their responses before and after."""
MOST_TEXT = 2000
"""Characters of a prompt or a response that are shown."""
MOST_TOKENS = 500
"""Tokens of a response that are shown with their numbers."""
_STAGES = {
    "generation": "generation_time_sec", "rewards": "reward_compute_time_sec", "update": "update_time_sec",
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A picture with its caption."""

    caption: str
    svg: Markup


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Write the page of one run, or of several beside each other.

    Raises:
        OutputError: The file cannot be written.
    """
    text = render(runs, path.absolute().parent).encode("utf-8", "replace").decode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path.parent, error) from None
    write_text(path, text)


def render(runs: Sequence[Run], folder: Path | None, state: str = "") -> str:
    """Return the page.

    Args:
        runs: One, or several to compare.
        folder: Where its links to checkpoints start from; None: it has no links.
        state: What the page shows, if it is served and should follow its runs.
    """
    style, page_script, watch_script, body = (
        (files("konic.report") / name).read_text(encoding="utf-8")
        for name in ("page.css", "page.js", "watch.js", "page.html")
    )
    script = page_script + (watch_script if state else "")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "signed": _signed, "duration": duration, "cut": _cut}
    template = environment.from_string(body)
    run = runs[0] if len(runs) == 1 else None
    names = _names(runs)
    last = run.samples(run.history[-1]["iteration"]) if run else []
    outcomes = dict(zip(names, map(outcome, runs), strict=True))
    return template.render(
        title=f"{names[0]} – konic report" if run else f"{len(runs)} runs – konic report",
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        digest=digest,
        state=state,
        run=run,
        runs=dict(zip(names, runs, strict=True)),
        outcomes=outcomes,
        suspicions=suspicions(run, outcomes[names[0]]) if run else [],
        findings=_findings(run) if run else [],
        parts=_parts(run) if run else [],
        frontier=Markup(charts.frontier(_frontiers(names, runs, folder), linked=folder is not None)),  # noqa: S704
        figures=_figures_of(run) if run else _figures_of_all(names, runs),
        pairs=_pairs(run) if run else [],
        samples=_last_samples(last),
        replays=_replays(run, last) if run else {},
        older=OLDER,
        settings=_flat(run.settings) if run else _different(names, runs),
        facts=_facts(run) if run else {},
        notes=[note for each in runs for note in each.notes],
        data=Markup(_as_json(names, runs)),  # noqa: S704
        made=f"{datetime.now():%Y-%m-%d %H:%M}",
        version=__version__,
    )


def _names(runs: Sequence[Run]) -> list[str]:
    """The name of each run's folder, or its path where two have one name."""
    names = [run.name for run in runs]
    return [str(run.path) if names.count(name) > 1 else name for run, name in zip(runs, names, strict=True)]


def _figures_of(run: Run) -> list[Figure]:
    held_out = {at: evaluation.reward_mean for at, evaluation in run.evaluations.items()}
    held_out = {at: value for at, value in held_out.items() if not math.isnan(value)}
    limit = as_number(run.settings.get("kl_limit"))
    kl = run.curve("kl_per_response")
    near = max(kl.values(), default=0.0) > limit / 3  # False for NaN, which stands for none
    times = {name: run.curve(key) for name, key in _STAGES.items()}
    caption = "Reward of each batch, ± its standard deviation" + ("; marked: held-out prompts" if held_out else "")
    pictures = {
        caption: charts.lines({"reward": run.curve("reward_mean")}, "reward", run.curve("reward_std"), held_out),
        "Each reward, before its weight": charts.lines(
            {name: run.curve(f"{PART}{name}") for name in run.parts}, "mean value"
        ),
        "KL from the reference" + ("; dashed: kl_limit" if near else ""): charts.lines(
            {"KL": kl}, "nats per response", limit=limit if near else None
        ),
        "Objective: reward − penalties − β · KL": charts.lines({"objective": run.curve("objective")}, "reward"),
        "Length of the responses": charts.lines({"tokens": run.curve("response_length_mean")}, "tokens"),
        "Entropy of the policy": charts.lines({"entropy": run.curve("entropy")}, "nats per token"),
        "Losses": charts.lines(
            {"policy": run.curve("policy_loss"), "value": run.curve("value_loss"), "KL": run.curve("kl_loss")},
            "loss",
        ),
        "Share of clipped tokens": charts.lines({"clipped": run.curve("clip_fraction")}, "share"),
        "Time of each stage": charts.stacked(times, "seconds"),
    }
    return [Figure(caption, Markup(svg)) for caption, svg in pictures.items()]  # noqa: S704


def _figures_of_all(names: Sequence[str], runs: Sequence[Run]) -> list[Figure]:
    wanted = {
        "Reward of each batch": ("reward_mean", "reward"),
        "KL from the reference": ("kl_per_response", "nats per response"),
        "Objective: reward − penalties − β · KL": ("objective", "reward"),
        "Length of the responses": ("response_length_mean", "tokens"),
        "Entropy of the policy": ("entropy", "nats per token"),
        "Time of an iteration": ("total_time_sec", "seconds"),
    }
    return [
        Figure(
            caption,
            Markup(  # noqa: S704
                charts.lines({name: run.curve(key) for name, run in zip(names, runs, strict=True)}, unit)
            ),
        )
        for caption, (key, unit) in wanted.items()
    ]


def _frontiers(names: Sequence[str], runs: Sequence[Run], folder: Path | None) -> dict[str, Any]:
    found = {}
    for name, run in zip(names, runs, strict=True):
        place = run.path.absolute()
        start = (
            f"{place.relative_to(folder).as_posix()}/"
            if folder and place.is_relative_to(folder) and place != folder
            else ""
        )
        links = {at: f"{start}{saved}/" for at, saved in run.checkpoints.items()}
        found[name] = (run.curve("kl_per_response"), run.curve("reward_mean"), links)
    return found


def _parts(run: Run) -> list[dict[str, Any]]:
    """Each reward with its weight and its mean before and after."""
    weights, rows = run.weights, []
    for name in run.parts:
        before, after = part_means(run, name)
        rows.append({"name": name, "weight": weights.get(name, "–"), "before": before, "after": after})
    return rows


def _findings(run: Run) -> list[tuple[int, str, str]]:
    """The self-checks that failed: the iteration that each was first seen in, its name, and what it said."""
    found = []
    for row in run.history:
        names, messages = row.get("checks"), row.get("check_messages")
        said = messages if isinstance(messages, dict) else {}  # older runs have none
        found += [
            (row["iteration"], str(name), str(said.get(str(name), "")))
            for name in (names if isinstance(names, list) else ())
        ]
    return found


def _pairs(run: Run) -> list[dict[str, Any]]:
    if len(run.evaluations) != 2:
        return []
    before, after = run.evaluations.values()
    if before.prompts != after.prompts:
        return []
    return [
        {
            "prompt": prompt,
            "before": before.responses[index],
            "after": after.responses[index],
            "reward_before": before.rewards[index],
            "reward_after": after.rewards[index],
            "gain": after.rewards[index] - before.rewards[index],
            "kl": after.kl_per_response[index],
        }
        for index, prompt in enumerate(before.prompts[:MOST_PAIRS])
    ]


def _last_samples(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The best, the worst and the most moved responses of the last iteration."""
    empty = {"prompt": "", "response": "", "kl": None, "ended": True}
    samples = [empty | row for row in rows if not math.isnan(as_number(row.get("reward")))]
    if not samples:
        return {}
    by_reward = sorted(samples, key=lambda row: as_number(row["reward"]))
    by_kl = sorted(samples, key=lambda row: 0.0 if math.isnan(as_number(row["kl"])) else as_number(row["kl"]))
    return {
        "Highest reward": by_reward[:-3:-1],
        "Lowest reward": by_reward[:2],
        "Furthest from the reference": by_kl[:-3:-1],
    }


@dataclass(frozen=True)
class Token:
    """A token with its numbers, and how strongly it is coloured: from -1, its advantage is the lowest, to 1."""

    text: str
    strength: float
    numbers: dict[str, float]


def _replays(run: Run, rows: Sequence[dict[str, Any]]) -> dict[str, tuple[Replay, float, list[Token]]]:
    """The best, the worst and the most moved response with its largest advantage and its tokens; one may be several."""
    titles: dict[int, list[str]] = {}
    found = chosen_of(run, rows)
    for name, replay in found.items():
        titles.setdefault(replay.sample, []).append(name)
    shown = {}
    for names in titles.values():
        replay = found[names[0]]
        most = max((abs(value) for value in replay.numbers.get("advantage", []) if not math.isnan(value)), default=0.0)
        tokens = []
        for index, text in enumerate(replay.tokens[:MOST_TOKENS]):
            numbers = {name: values[index] for name, values in replay.numbers.items()}
            value = numbers.get("advantage", math.nan)
            tokens.append(Token(text[:100], 0.0 if not most or math.isnan(value) else value / most, numbers))
        shown[" and ".join(names)] = (replay, most, tokens)
    return shown


def _facts(run: Run) -> dict[str, Any]:
    """What the run was made with and on."""
    named = (run.record.get(name) for name in ("environment", "machine", "rewards"))
    environment, machine, rewards = (value if isinstance(value, dict) else {} for value in named)
    facts = {
        "command": run.record.get("command"),
        "rewards": rewards.get("file"),
        "rewards' SHA-256": rewards.get("sha256"),
    }
    facts |= {str(name): value for name, value in environment.items()} | {"platform": machine.get("platform")}
    facts["time"] = duration(sum(value for value in run.values("total_time_sec") if not math.isnan(value)))
    facts["responses"] = f"{nanmean(run.values('num_samples')) * len(run.history):.0f}"
    return {name: value for name, value in facts.items() if value not in (None, "")}


def _flat(settings: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    """Settings by their names, those inside others as `outer.inner`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{start}{name}.")
        else:
            flat[f"{start}{name}"] = json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value
    return flat


def _different(names: Sequence[str], runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings in which runs differ, with the value of each."""
    flat = [_flat(run.settings) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = {key: [settings.get(key) for settings in flat] for key in keys}
    return {key: values for key, values in rows.items() if len({str(value) for value in values}) > 1}


def _as_json(names: Sequence[str], runs: Sequence[Run]) -> str:
    """The metrics, thinned as the pictures are, for who wants to read them from the page; `<` cannot end a script."""
    keys = ("reward_mean", "kl_per_response", "objective", "response_length_mean", "entropy")
    data = {}
    for name, run in zip(names, runs, strict=True):
        columns = {key: run.values(key) for key in keys}
        groups = thinned(len(run.history), charts.MOST_POINTS)
        rows = {key: [nanmean([values[i] for i in group]) for group in groups] for key, values in columns.items()}
        kept = {key: [None if math.isnan(value) else value for value in values] for key, values in rows.items()}
        data[name] = {"iteration": [run.history[group[-1]]["iteration"] for group in groups]} | kept
    return json.dumps(data).replace("<", "\\u003c").replace("&", "\\u0026")


def _number(value: Any, digits: int = 3) -> str:
    number = as_number(value)
    return "–" if math.isnan(number) else f"{number:.{digits}f}"


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.3f}"


def _cut(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]} … ({len(text) - MOST_TEXT:,} more characters)"
