"""The responses of an iteration -> why each got its advantage, token by token. No model is loaded, only its tokenizer.

Files of a run come from anyone: a number that is missing or of another type is NaN.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from konic.finetuning.algorithms import ALGORITHMS
from konic.finetuning.errors import OutputError
from konic.finetuning.models.tokenizer_rules import find_unbounded_rule
from konic.finetuning.results.intervals import nanmean, spread
from konic.finetuning.system.places import find_stray, read_regular
from konic.report.run import PART, Run, as_number
from konic.text import redact

SECONDS = "seconds/"
"""Begins the name of a column that holds the time of a reward."""
NUMBERS = {
    "advantage": "advantages", "kl": "token_kl", "value": "values", "log_prob": "log_probs", "entropy": "entropy",
}  # fmt: skip
"""The columns with a number for each token, by the names that are shown."""
OLDER = "This run was made before konic recorded the numbers of each token."
MOST_BYTES = 4
"""Tokens that one character of UTF-8 can have."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """One response with all that was recorded about it."""

    sample: int
    """Its number in the iteration, from 1."""
    prompt: str
    response: str
    reward: float
    """NaN if it has none."""
    parts: dict[str, float]
    """Each part of the reward before its weight; NaN where it abstained or failed."""
    seconds: dict[str, float]
    """The time of each reward."""
    kl: float
    """Nats, of the whole response."""
    ended: bool
    left_out: str | None
    """Why it is left out of the loss."""
    error: str | None
    """What failed on it."""
    tokens: list[str]
    """The text of each token; empty for all but the last token of a character."""
    numbers: dict[str, list[float]]
    """By a name of NUMBERS, a number for each token; without the names that were not recorded."""
    why: str
    """Why it got its advantage, in a sentence."""

    def as_json(self) -> dict[str, Any]:
        """Return it with null where there is no number."""
        return {name: _without_nan(value) for name, value in vars(self).items()}


def replays(run: Run, iteration: int) -> list[Replay]:
    """Return every response of an iteration.

    Raises:
        OutputError: The iteration has no responses that can be read.
    """
    rows = run.samples(iteration)
    if not rows:
        names = [file.stem for file in (run.path / "completions").glob("*.parquet")]
        done = sorted(int(name) for name in names if name.isascii() and name.isdigit() and len(name) < 10)
        has = f"It has iterations {done[0]} to {done[-1]}." if done else "It has none."
        note = next((f" {note}." for note in run.notes if f"{iteration:06d}.parquet" in note), "")
        raise OutputError(f"{run.path} has no responses of iteration {iteration} that can be read.{note} {has}")
    decode = _decoder(run)
    is_whitened = _is_whitened(run, rows)
    return [_replay(run, rows, index, decode, is_whitened) for index in range(len(rows))]


def choose(samples: Sequence[Replay]) -> dict[str, Replay]:
    """Return the best, the worst and the most moved response; the first two only if one has a reward."""
    found = _extremes([sample.reward for sample in samples], [sample.kl for sample in samples])
    return {name: samples[index] for name, index in found.items()}


def chosen_of(run: Run, rows: Sequence[dict[str, Any]]) -> dict[str, Replay]:
    """Return what `choose` would of the responses of an iteration, without a replay of the others."""
    found = _extremes([as_number(row.get("reward")) for row in rows], [as_number(row.get("kl")) for row in rows])
    decode = _decoder(run) if found else None
    is_whitened = _is_whitened(run, rows)
    return {name: _replay(run, rows, index, decode, is_whitened) for name, index in found.items()}


def _extremes(rewards: Sequence[float], kl: Sequence[float]) -> dict[str, int]:
    scored = [index for index, value in enumerate(rewards) if not math.isnan(value)]
    moved = [index for index, value in enumerate(kl) if not math.isnan(value)]
    found = {}
    if scored:
        found["best"] = max(scored, key=lambda index: rewards[index])
        found["worst"] = min(scored, key=lambda index: rewards[index])
    if moved:
        found["most moved"] = max(moved, key=lambda index: kl[index])
    return found


def _replay(
    run: Run,
    rows: Sequence[dict[str, Any]],
    index: int,
    decode: Callable[[list[int]], str] | None,
    is_whitened: bool,
) -> Replay:
    row = rows[index]
    recorded = row.get("token_ids")
    ids = [one for one in recorded if isinstance(one, int) and 0 <= one < 2**32] if isinstance(recorded, list) else []
    response = str(row.get("response") or "")
    tokens = _token_texts(ids, decode if redact(response) == response else None)
    numbers = {
        name: [as_number(value) for value in row[column]]
        for name, column in NUMBERS.items()
        if isinstance(row.get(column), list) and len(row[column]) == len(ids)
    }
    return Replay(
        sample=index + 1,
        prompt=str(row.get("prompt") or ""),
        response=response,
        reward=as_number(row.get("reward")),
        parts={name.removeprefix(PART): as_number(row[name]) for name in row if name.startswith(PART)},
        seconds={name.removeprefix(SECONDS): as_number(row[name]) for name in row if name.startswith(SECONDS)},
        kl=as_number(row.get("kl")),
        ended=bool(row.get("ended")),
        left_out=_text(row.get("left_out")),
        error=_text(row.get("error")),
        tokens=tokens,
        numbers=numbers,
        why=_why(run, rows, index, numbers, is_whitened),
    )


def _why(
    run: Run, rows: Sequence[dict[str, Any]], index: int, numbers: dict[str, list[float]], is_whitened: bool
) -> str:
    """Why a response got its advantage, with the numbers that decided it."""
    row = rows[index]
    reward, signal = as_number(row.get("reward")), numbers.get("advantage", [])
    if "advantages" not in row:
        return OLDER
    if row.get("left_out"):
        return f"It was left out of the loss: {row['left_out']}."
    if math.isnan(reward):
        what = "a reward failed on it" if row.get("error") else "every reward abstained"
        return f"It has no reward, because {what}: nothing was learned from it."
    if not signal:
        return "The update did not use it: its batch was dropped, or it has no tokens."
    if not any(signal):
        return "All its advantages are 0: the rewards did not say which response is better."
    rule, size = _rule(run)
    explained, may_apply = None, ("value" in numbers) == (rule == "gae")  # only PPO learns values
    if may_apply and rule not in ("gae", "reward_to_go"):
        explained = _in_group(run, rule, size, rows, index, signal)
    elif may_apply and is_whitened:
        explained = _after_whitening(rule, rows, index, numbers)
    return explained or (
        f"Its reward is {reward:.3f}, and its advantage {nanmean(signal):+.3f}{_same(signal)}. The settings in "
        "run.json do not say how the one led to the other: they may have changed since this iteration."
    )


def _rule(run: Run) -> tuple[str, int]:
    """The rule of the run's algorithm, and how many responses each prompt got."""
    algorithm = ALGORITHMS.get(str(run.settings.get("algorithm")), ALGORITHMS["ppo"])
    size = run.settings.get("num_generations")
    return algorithm.advantages, size if isinstance(size, int) and size > 0 else algorithm.group_size


def _is_whitened(run: Run, rows: Sequence[dict[str, Any]]) -> bool:
    """False if the advantages of an iteration are seen not to be whitened over the batch."""
    if any(row.get("left_out") or _is_weighted(run, row) for row in rows):
        return True  # others than those that were whitened are recorded
    batch = [as_number(value) for row in rows for value in _list(row.get("advantages"))]
    return _is_near(nanmean(batch), 0.0) and _is_near(spread(batch), 1.0)


def _after_whitening(rule: str, rows: Sequence[dict[str, Any]], index: int, numbers: dict[str, list[float]]) -> str:
    signal, rewards = numbers["advantage"], [as_number(row.get("reward")) for row in rows]
    against = (
        f"the value head expected {numbers['value'][0]:.3f} before the first token"
        if rule == "gae"
        else f"the mean of the batch is {nanmean(rewards):.3f}"
    )
    return (
        f"Its reward is {rewards[index]:.3f}, and {against}. Whitened over the batch, to mean 0 and standard deviation "
        f"1, its advantages go from {min(signal):+.3f} to {max(signal):+.3f}, with mean {nanmean(signal):+.3f}."
    )


def _in_group(
    run: Run, rule: str, size: int, rows: Sequence[dict[str, Any]], index: int, signal: Sequence[float]
) -> str | None:
    """Why, where the responses to a prompt are compared.

    None if it has another number of responses, or if the rule gives another advantage.
    """
    alike = _neighbours(rows, index)
    if len(alike) != size:
        return None
    reward, rewards = as_number(rows[index].get("reward")), [as_number(other.get("reward")) for other in alike]
    group = [value for value in rewards if not math.isnan(value)]
    said, expected = _compared(rule, reward, group)
    follows = all(_is_near(value, expected) for value in signal)
    settings = [run.settings.get(name) for name in ("missing_eos_penalty", "overlong_penalty")]
    is_penalised = any(settings) or run.settings.get("kl_placement") == "reward"
    if not (follows or is_penalised or math.isnan(expected) or _is_weighted(run, rows[index])):
        return None
    also = " Penalties for KL or length are in it too." if is_penalised and not follows else ""
    return f"{said} Its advantage is {nanmean(signal):+.3f}{_same(signal)}.{also}"


def _neighbours(rows: Sequence[dict[str, Any]], index: int) -> list[dict[str, Any]]:
    """The responses to the same row of the data beside this one: samples of one prompt are neighbours."""
    prompts = [(row.get("row"), row.get("prompt")) for row in rows]
    start, end = index, index + 1
    while start > 0 and prompts[start - 1] == prompts[index]:
        start -= 1
    while end < len(rows) and prompts[end] == prompts[index]:
        end += 1
    return list(rows[start:end])


def _is_weighted(run: Run, row: dict[str, Any]) -> bool:
    """True if `sampler_correction` has changed advantages in the iteration of a response."""
    metrics = next((each for each in run.history if each["iteration"] == row.get("iteration")), {})
    return as_number(metrics.get("effective_sample_size")) < 1


def _is_near(value: float, expected: float) -> bool:
    return math.isclose(value, expected, rel_tol=0.01, abs_tol=0.01)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _compared(rule: str, reward: float, group: Sequence[float]) -> tuple[str, float]:
    """How a rule compares a reward with those of its group, and its advantage; NaN where other groups decide too."""
    start, count, centre = f"Its reward is {reward:.3f}", len(group), nanmean(group)
    if rule == "leave_one_out":
        others = (math.fsum(group) - reward) / max(1, count - 1)
        said = f"{start}, and the other {count - 1} responses to its prompt have the mean {others:.3f}."
        return said, reward - others
    if rule == "parts_normalised":
        said = f"{start}: each part of it is compared with the {count} responses to its prompt, then weighted."
        return said, math.nan
    said = f"{start}, {reward - centre:+.3f} from the mean {centre:.3f} of the {count} responses to its prompt"
    if rule == "group_normalised":
        deviation = spread(group)
        said = f"{said}, whose standard deviation is {deviation:.3f}: the difference is divided by it."
        return said, (reward - centre) / (deviation + 1e-4)
    if rule == "group_mean_normalised":
        return f"{said}; the difference is divided by that mean.", (reward - centre) / centre if centre else math.nan
    return f"{said}.", reward - centre


def _same(signal: Sequence[float]) -> str:
    low, high = min(signal), max(signal)
    return " for every token" if high - low < 1e-6 else f" on average, from {low:+.3f} to {high:+.3f}"


def _decoder(run: Run) -> Callable[[list[int]], str] | None:
    """What turns ids into text: the tokenizer that the run saved. None if there is none that can be read."""
    from tokenizers import Tokenizer

    for folder in reversed(run.checkpoints.values()):
        path = run.path / folder / "tokenizer.json"
        if path.exists() and not find_stray([path], run.path):
            try:
                problem = find_unbounded_rule(path)
                if problem is not None:
                    raise ValueError(problem)
                tokenizer = Tokenizer.from_str(read_regular(path).decode())
            except Exception as error:  # the library raises no narrower one
                run.notes.append(f"{folder}/tokenizer.json cannot be read ({error}), so tokens are shown as their ids.")
                return None
            return lambda ids: str(tokenizer.decode(ids, skip_special_tokens=False))
    return None


def _token_texts(ids: list[int], decode: Callable[[list[int]], str] | None) -> list[str]:
    """The text of each token: what it adds to the tokens before it. Ids in brackets without a tokenizer."""
    if decode is None:
        return [f"[{one}]" for one in ids]
    texts, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        now = decode(ids[start:end])
        if now.endswith("\ufffd") and end - done < MOST_BYTES and end < len(ids):
            texts.append("")  # the character ends in a later token
            continue
        texts.append(now[len(decode(ids[start:done])) :])
        start, done = done, end
    return texts


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and math.isnan(value) else value
