"""The files of a run -> its settings, metrics, evaluations and samples. Whatever is missing or broken is named."""

import io
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow

from konic.finetuning.data.formats import columns_of, read_table
from konic.finetuning.errors import KonicError, OutputError, did_you_mean
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.results.trained import iterations_in_card
from konic.finetuning.rewards.outcomes import Reward
from konic.finetuning.rewards.totals import Weighting, part_weights
from konic.finetuning.system.places import find_stray, read_json, read_regular
from konic.text import describe_error

PART = "reward/"
"""Begins the name of a column that holds one part of the reward."""
MOST_PARTS = 100
"""Rewards that are shown."""
_LONGEST_NAME = 200
"""Characters of the name of a reward that is shown."""
_BYTES_OF_VALUE, _MOST_BYTES = 150, 10**9
"""What a metric takes in memory, and the most that all of them may: enough for 100,000 iterations of six rewards."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the folder of a run holds, read once."""

    path: Path
    record: dict[str, Any]
    """`run.json`: settings, rewards, environment, machine."""
    history: list[dict[str, Any]]
    """The metrics of each iteration; a number that is not there is NaN."""
    evaluations: dict[int, Evaluation]
    """The first and the last evaluation on held-out prompts, by the iterations that the policy had learned from."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, a sentence each."""

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Read the folder of a run, also of one that is going on or was cut off.

        Raises:
            OutputError: It is not the folder of a run, or the run has not done an iteration.
        """
        if not path.is_dir():
            raise OutputError(f"{path}: there is no such folder. Name the folder of a run, such as runs/my-run.")
        if not (path / "run.json").exists():
            runs = sorted(file.parent for file in (*path.glob("*/run.json"), path.parent / "run.json") if file.exists())
            hint = (
                f" Did you mean {runs[-1]}?"
                if runs
                else " Give the folder that a training wrote, not an exported model."
            )
            raise OutputError(f"{path} is not the folder of a run: it has no run.json.{hint}")
        notes: list[str] = []
        history = list(_read_metrics(path, notes))
        if not history:
            why = f" {notes[0]}" if notes else ""
            raise OutputError(f"{path}: its run has not finished an iteration yet, so there is nothing to show.{why}")
        return cls(
            path=path,
            record=_read_record(path, notes),
            history=history,
            evaluations=_read_evaluations(path, notes),
            notes=notes,
        )

    @property
    def name(self) -> str:
        """The name of the folder."""
        return self.path.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `run.json`."""
        settings = self.record.get("settings")
        return settings if isinstance(settings, dict) else {}

    @property
    def checkpoints(self) -> dict[int, str]:
        """The folders that hold weights, by the iterations that these had learned from."""
        names = [name for name in self.saved if name != "best"]  # final comes after the checkpoint with its weights
        last = self.history[-1]["iteration"]
        return dict(sorted({self.iterations_of(name) or last: name for name in names}.items()))

    @property
    def saved(self) -> list[str]:
        """The names of the folders that hold weights: checkpoints in order, then `final` and `best`."""
        folders = self._folders()
        numbers = sorted(int(name[11:]) for name in folders if re.fullmatch(r"checkpoint-(0|[1-9][0-9]{0,8})", name))
        return [*(f"checkpoint-{number}" for number in numbers), *(n for n in ("final", "best") if n in folders)]

    def iterations_of(self, name: str) -> int | None:
        """The iterations that the weights in a folder had learned from; of `best`, the one that they sampled.

        `final` may be of fewer iterations than the run has done since it was resumed. None if its card does not say.
        """
        if name.startswith("checkpoint-"):
            return int(name[11:])
        folder = self.path / name
        return None if find_stray([folder / "README.md"], self.path) else iterations_in_card(folder)

    def find_weights(self, asked: str | None, *others: str) -> str:
        """Return the name of the folder that holds the weights asked for; None asks for the newest ones.

        `others` are names that may be asked for too.

        Raises:
            OutputError: The run has no such weights, or they lie elsewhere.
        """
        chosen = asked or next(reversed(self.checkpoints.values()), None)
        saved = self.saved
        if chosen in others:
            return str(chosen)
        if chosen not in saved:
            hint = did_you_mean(chosen, [*saved, *others]) if chosen else ""
            has = ", ".join([*saved, *others]) or "none"
            raise OutputError(f"{self.path} has no weights {chosen or 'yet'!r}.{hint} It has: {has}.")
        if not (self.path / chosen).resolve().is_relative_to(self.path.resolve()):
            raise OutputError(f"{self.path / chosen}: is a link out of the run's folder. Put the folder itself there.")
        return chosen

    def _folders(self) -> list[str]:
        return sorted(path.name for path in self.path.iterdir() if path.is_dir())

    def values(self, name: str) -> list[float]:
        """A metric of every iteration, NaN where it is not there; `reward/NAME` is a part of the reward."""
        if name.startswith(PART):
            parts = (row.get("reward_breakdown") for row in self.history)
            return [as_number(part.get(name.removeprefix(PART)) if isinstance(part, dict) else None) for part in parts]
        return [as_number(row.get(name)) for row in self.history]

    def curve(self, name: str) -> dict[int, float]:
        """A metric by its iteration: a line that is left out leaves a gap."""
        return dict(zip((row["iteration"] for row in self.history), self.values(name), strict=True))

    @property
    def parts(self) -> list[str]:
        """The names of the rewards that any iteration has, the first hundred."""
        parts = (row.get("reward_breakdown") for row in self.history)
        names = dict.fromkeys(name for part in parts if isinstance(part, dict) for name in part)
        return [name for name in names if len(name) <= _LONGEST_NAME][:MOST_PARTS]

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each of `parts`, as training looks it up; empty if the record does not say it."""
        parts, names, given = self.parts, self.settings.get("rewards"), self.settings.get("reward_weights")
        names = names if isinstance(names, list) else [part.partition(".")[0] for part in parts]
        given = {name: as_number(weight) for name, weight in given.items()} if isinstance(given, dict) else {}
        try:
            weights = part_weights(Weighting([Reward(name, float) for name in names], given, None), parts)
        except KonicError:  # no training has such names or weights
            return {}
        return {} if any(math.isnan(weights.get(part, math.nan)) for part in parts) else weights

    def samples(self, iteration: int) -> list[dict[str, Any]]:
        """The responses of an iteration, as `completions/` holds them; empty, with a note, if they cannot be read."""
        return _read_rows(self.path / "completions" / f"{iteration:06d}.parquet", self.path, self.notes)


def as_number(value: Any) -> float:
    """Return a number of a file that comes from anyone; NaN if it is missing, of another type, or has no bounds."""
    try:
        number = float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _read_record(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        _require_here(path / "run.json", path)
        record = read_json(path / "run.json")
    except (OSError, ValueError) as error:
        notes.append(f"run.json cannot be read ({describe_error(error)}), so the settings are not known.")
        return {}
    return record if isinstance(record, dict) else {}


def _read_metrics(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Every whole line of `metrics.jsonl`; what a run that was cut off, or another tool, left is noted."""
    try:
        _require_here(path / "metrics.jsonl", path)
        content = read_regular(path / "metrics.jsonl")
    except FileNotFoundError:
        return
    except OSError as error:
        raise OutputError(f"{path}: metrics.jsonl cannot be read: {describe_error(error)}.") from None
    taken = 0
    for number, line in enumerate(io.BytesIO(content), 1):
        taken += _BYTES_OF_VALUE * (4 + sum(line.count(mark) for mark in b",[{"))
        if taken > _MOST_BYTES:
            most = f"{_MOST_BYTES / 10**9:g} GB of memory"
            notes.append(f"metrics.jsonl is left out from line {number} on: all of it would take more than {most}.")
            return
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or type(row["iteration"]) is not int or not 0 < row["iteration"] < 10**9:
                raise ValueError("it is not the metrics of an iteration")
        except (ValueError, KeyError, RecursionError) as error:
            notes.append(f"metrics.jsonl, line {number} is left out: {error}")
        else:
            yield row


def _read_evaluations(path: Path, notes: list[str]) -> dict[int, Evaluation]:
    files = {int(file.stem): file for file in (path / "evaluations").glob("*.parquet") if _is_number(file.stem)}
    found = {}
    for number in sorted({min(files), max(files)}) if files else ():
        rows = _read_rows(files[number], path, notes)
        if not rows:
            continue
        columns = columns_of(rows)
        try:
            found[number] = Evaluation(
                prompts=[str(prompt) for prompt in columns["prompt"]],
                responses=[str(response) for response in columns["response"]],
                rewards=[as_number(value) for value in columns["reward"]],
                breakdown={
                    name.removeprefix(PART): [as_number(value) for value in values]
                    for name, values in columns.items()
                    if name.startswith(PART)
                },
                kl_per_response=[as_number(value) for value in columns["kl"]],
                response_lengths=[int(value or 0) for value in columns["length"]],
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            notes.append(f"evaluations/{files[number].name} is left out: {error!r}")
    return found


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _read_rows(path: Path, run: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the rows of a table; none, with a note, if it cannot be read."""
    if not path.exists():
        return []
    try:
        return read_table(path, run)
    except (OSError, ValueError, MemoryError, pyarrow.ArrowException) as error:
        notes.append(f"{path.parent.name}/{path.name} is left out, because it cannot be read: {describe_error(error)}")
        return []


def _require_here(path: Path, run: Path) -> None:
    """Raise OSError for a file of a run that is a link to elsewhere, or no regular file."""
    stray = find_stray([path], run) if path.exists() else None
    if stray is not None:
        raise OSError(stray)
