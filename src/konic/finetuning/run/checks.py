"""Results -> findings: checks in every run for what goes wrong silently in reinforcement learning.

A finding is reported once, with what it means and what to try, and its name is kept in the `checks` of the iteration.
What stops a run is in `invariants.py`.
"""

import math
from collections.abc import Callable, Collection, Sequence

from konic.finetuning.config import GenerationConfig, TrainingConfig
from konic.finetuning.results.intervals import mean
from konic.finetuning.results.iteration import FinetuningIterationResult

PATIENCE = 3
"""Iterations in a row that a fault must last before it is reported: one batch may show it by chance."""
MIN_SAMPLES = 12
"""Responses, or prompts where several responses to one are as alike, that say something about all of them: three
iterations of a small batch are too few."""
BY_CHANCE = 1e-4
"""How likely chance may make what one look reports. A run looks after every iteration."""
MAX_UNASKED_KL = 10.0
"""Nats per response that a policy pays at most, unless kl_limit, kl_budget or kl_target allow more."""
MIN_SAMPLE_SIZE = 0.5
"""Share of the samples that should count after the correction for another sampler."""
MAX_CORRECTED_GAP = 0.1
"""Mean |Δ log-prob| per token, nats, that a sampler of the same weights stays below: bf16 made 0.006 (docs/gpu.md)."""
MIN_VARIETY = 0.6
"""Share of its first distinct-2 that text may fall to while its reward rises."""
MAX_SURPRISE = 1.0
"""Nats per token by which the reference may be more surprised by text whose reward rises."""
ROUNDING = 1e-6
"""A smaller fall of the objective is the rounding of a KL of 0, where all rewards are equal."""
History = Sequence[FinetuningIterationResult]
_Finding = Callable[[History, TrainingConfig, GenerationConfig], str | None]


def new_findings(
    history: History, config: TrainingConfig, generation: GenerationConfig, unfit: Collection[str] = ()
) -> dict[str, str]:
    """The checks that fail for the first time in the last iteration of a history: a message by the name of each.

    Dropped iterations are left out: their numbers are those that must not count. So are the checks named in `unfit`.
    """
    reported = {name for result in history for name in result.checks}
    counted = [result for result in history if not result.was_dropped]
    if not counted or counted[-1] is not history[-1]:
        return {}
    due = {name: find for name, find in FINDINGS.items() if name not in reported and name not in unfit}
    found = {name: find(counted, config, generation) for name, find in due.items()}
    return {name: message for name, message in found.items() if message is not None}


def _constant_reward(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    recent, scored = _shortest(history[::-1]), _scored(history)
    if not recent or any(r.num_unscored == r.num_samples or r.penalty_mean for r in recent):
        return None
    value = recent[0].reward_min
    others = [_num_others(result, value) for result in scored]
    last = max((number for number, count in enumerate(others, 1) if count), default=0)
    recent = scored[last:]
    if len(recent) < PATIENCE or any(result.reward_std > 0 for result in recent):
        return None
    before, now = (sum(r.num_samples - r.num_unscored for r in part) for part in (scored[:last], scored))
    # that the last other reward of so many comes no later, if nothing has changed
    if last and (before / now) ** (sum(others) / config.responses_per_prompt) > BY_CHANCE:
        return None
    said = f"Every response of the last {len(recent)} iterations got the reward {recent[0].reward_mean:g}"
    if recent[0].reward_min >= max(r.reward_max for r in scored) > min(r.reward_min for r in scored):
        return (
            f"{said}, the highest of the run: there is nothing more to learn from. If the responses in completions/ "
            "are what you want, the task is solved; if not, the reward is too easy to earn."
        )
    return (
        f"{said}: there is nothing to learn from. Look at completions/: is the reward what you meant? A reward that "
        "grows in small steps teaches sooner than a rare one."
    )


def _num_others(result: FinetuningIterationResult, value: float) -> float:
    """How many responses of an iteration have another reward than `value`, at least; exact if there are two rewards."""
    span = max(abs(result.reward_max - value), abs(result.reward_min - value))
    num_scored = result.num_samples - result.num_unscored
    return num_scored * abs(result.reward_mean - value) / span if span else 0.0


def _scored(history: History) -> History:
    """The iterations in which a response has a reward."""
    return [result for result in history if result.num_unscored < result.num_samples]


def _shortest(history: History, size: int = 1) -> History:
    """The first iterations of a history, PATIENCE or more, that hold MIN_SAMPLES groups of so many scored responses.

    Empty if there are not so many.
    """
    count = 0
    for number, result in enumerate(history, 1):
        count += result.num_samples - result.num_unscored
        if number >= PATIENCE and count >= MIN_SAMPLES * size:
            return history[:number]
    return []


def _ends(history: History, size: int = 1) -> tuple[History, History]:
    """The first and the last iterations that are :func:`_shortest`; both empty if they overlap."""
    start, recent = _shortest(history, size), _shortest(history[::-1], size)
    return (start, recent) if len(start) + len(recent) <= len(history) else ([], [])


def _single_response(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    if config.batch_size > 1 or config.algorithm_row.advantages not in ("gae", "reward_to_go"):
        return None
    return (
        f"batch_size=1: {config.algorithm} compares the responses of a batch (it whitens their advantages), and one "
        "alone has nothing to be compared with, so its reward is lost. Set batch_size to 4 or more; "
        "gradient_accumulation_steps keeps the memory as it is."
    )


def _equal_groups(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    recent = history[-PATIENCE:]
    silent = [max(r.no_signal_fraction, r.num_in_equal_groups / max(1, r.num_samples)) for r in recent]
    if len(recent) < PATIENCE or min(silent) < 0.9 or config.responses_per_prompt < 2:
        return None
    if len({end for r in recent for end in (r.reward_min, r.reward_max)}) == 1:
        return None  # `constant_reward` says more
    unscored = sum(r.num_unscored for r in recent) / sum(r.num_samples for r in recent)
    if unscored >= 0.5:
        return (
            f"In the last {PATIENCE} iterations nearly every group of responses to one prompt had too few rewards to "
            f"compare, which teaches {config.algorithm} nothing: {unscored:.0%} of the responses had none. "
            "See num_reward_errors in metrics.jsonl, and let the rewards return a number where they now return None."
        )
    return (
        f"In the last {PATIENCE} iterations nearly every group of responses to one prompt got equal rewards, which "
        f"teaches {config.algorithm} nothing. Raise num_generations (now {config.responses_per_prompt}) or the "
        "temperature, or use a reward with more different values."
    )


def _never_ends(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    num_responses = sum(result.num_samples for result in history)
    if generation.max_new_tokens == 1:
        return None  # a response of one token cannot end earlier
    if len(history) < PATIENCE or num_responses < 32 or any(result.ended_fraction > 0 for result in history):
        return None
    return (
        f"None of the first {num_responses} responses ended by itself: each was cut off at max_new_tokens="
        f"{generation.max_new_tokens}. If they should end, raise max_new_tokens, name the model's end token "
        "(eos_token_id) or strings that end a response (stop), or set missing_eos_penalty."
    )


def _all_cut_off(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    recent = _shortest(history[::-1])
    if not recent or not config.mask_truncated or any(r.ended_fraction > 0 for r in recent):
        return None
    return (
        f"mask_truncated left every response of the last {len(recent)} iterations out of the loss: each was cut off at "
        f"max_new_tokens={generation.max_new_tokens}, so the policy learns nothing. Raise max_new_tokens, or leave "
        "mask_truncated out."
    )


def _stopped_ending(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    last = max((index for index, result in enumerate(history, 1) if result.ended_fraction > 0), default=0)
    before, recent = history[:last], history[last:]
    if not before or len(recent) < PATIENCE:
        return None
    num_ended = sum(result.ended_fraction * result.num_samples for result in before) / config.responses_per_prompt
    num_before, num_now = (sum(result.num_samples for result in part) for part in (before, history))
    # that the last end of so many comes no later, if all responses are alike and those to one prompt count as one
    if (num_before / num_now) ** num_ended > BY_CHANCE:
        return None
    return (
        f"Responses used to end by themselves; in the last {len(recent)} iterations each was cut off at max_new_tokens="
        f"{generation.max_new_tokens}. The reward may favour length: look at completions/, and set "
        "missing_eos_penalty or add a reward for brevity."
    )


def _empty_responses(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    recent = _shortest(history[::-1])
    is_short = generation.max_new_tokens > 1 and all(r.response_length_mean <= 1 for r in recent)
    if not recent or not is_short or any(r.ended_fraction < 1 for r in recent):
        return None
    if any(r.distinct_fraction * r.num_samples > 1.5 for r in recent):
        return None  # texts that differ are not all empty: a token may hold a stop string and more
    return (
        f"Every response of the last {len(recent)} iterations is empty: the policy ends at once. The reward may favour "
        "empty responses: give them a low reward, or set min_new_tokens."
    )


def _entropy_collapse(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    first, recent = history[0].entropy, _shortest(history[::-1])
    if not recent or any(result.entropy >= 0.1 * first for result in recent):
        return None
    return (
        f"The policy's entropy fell from {first:.2f} to {recent[0].entropy:.2f} nats per token: its samples "
        "are nearly all the same, so it cannot find anything better. Go back to an earlier checkpoint; lower "
        "learning_rate, raise kl_penalty_weight, or set entropy_coef (0.01)."
    )


def _beyond_budget(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    paid = history[-1].kl_per_response
    if config.kl_budget is None or paid <= config.kl_budget:
        return None
    return (
        f"The policy is {paid:.1f} nats per response from its reference, beyond kl_budget={config.kl_budget:g}. The "
        "run continues; best/ keeps the best weights within the budget. To stay within it, set kl_target below it, or "
        "raise kl_penalty_weight."
    )


def _no_rewards(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    recent = history[-PATIENCE:]
    is_first = len(history) == 1
    if (len(recent) < PATIENCE and not is_first) or any(r.num_unscored < r.num_samples for r in recent):
        return None
    when = "the first iteration" if is_first else f"the last {PATIENCE} iterations"
    failed = sum(result.num_reward_errors for result in recent)
    if failed:
        return (
            f"No response of {when} has a score: {failed} calls of rewards failed, whose errors are shown above. "
            "Nothing was learned."
        )
    return (
        f"Every reward abstained from every response of {when}: nothing was learned. A reward abstains by returning "
        "None: is a `return` missing, or does it expect a format that the responses do not have?"
    )


def _objective_fell(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    start, recent = _ends(_scored(history), config.responses_per_prompt)
    if not recent:
        return None
    before, now = (mean([result.objective for result in part]) for part in (start, recent))
    if now >= before - max(_noise(start, recent, config), ROUNDING):
        return None
    return (
        f"The objective, the reward less penalties and less β · KL, was {before:.3f} in its first {len(start)} "
        f"iterations and is {now:.3f} in the last {len(recent)}: the policy pays more for its KL "
        f"({recent[0].kl_per_response:.1f} nats per response) than its reward gains. best/ holds the best weights from "
        "before. Use a larger batch_size, a lower learning_rate or fewer ppo_epochs."
    )


def _noise(start: History, recent: History, config: TrainingConfig) -> float:
    """By how much the mean rewards of two parts of a run may differ by chance: four standard errors.

    Responses to one prompt count as one, because they may all be right or all wrong. Beyond four standard errors is
    one of 30,000 numbers; a run looks at many.
    """
    errors = []
    for part in (start, recent):
        counts = [result.num_samples - result.num_unscored for result in part]
        means = [result.reward_mean for result in part]
        total = math.fsum(count * each for count, each in zip(counts, means, strict=True)) / sum(counts)
        squares = math.fsum(
            (count - 1) * result.reward_std**2 + count * (result.reward_mean - total) ** 2
            for count, result in zip(counts, part, strict=True)
        )
        errors.append(math.sqrt(squares / (sum(counts) - 1) * config.responses_per_prompt / sum(counts)))
    return 4 * math.hypot(*errors)


def _reward_hacking(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    start, recent = _ends(_scored(history), config.responses_per_prompt)
    if not recent:
        return None
    (before, now), (variety, variety_now), (loss, loss_now) = (
        [mean([getattr(result, name) for result in part]) for part in (start, recent)]
        for name in ("reward_mean", "distinct_2", "reference_loss")
    )
    if now <= before + _noise(start, recent, config):
        return None
    problem = f"The reward rose from {before:.3f} to {now:.3f}, but the text got worse: "
    advice = "The reward may pay for a trick: read completions/, add a reward for good text, or set kl_budget."
    if variety_now < MIN_VARIETY * variety:
        shares = f"{variety_now:.0%} of the pairs of words in a response are different, {variety:.0%} at first"
        return f"{problem}{shares}. {advice}"
    if loss_now > loss + MAX_SURPRISE:
        return f"{problem}the base model is surprised by {loss_now:.1f} nats per token, {loss:.1f} at first. {advice}"
    return None


def _kl_runaway(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    asked = max(MAX_UNASKED_KL, *(limit or 0.0 for limit in (config.kl_limit, config.kl_budget, config.kl_target)))
    recent = history[-PATIENCE:]
    if len(recent) < PATIENCE or any(result.kl_per_response <= asked for result in recent):
        return None
    return (
        f"The policy is {recent[-1].kl_per_response:.1f} nats per response from its reference, and has been beyond "
        f"{asked:g} for {PATIENCE} iterations: it is becoming another model, and its reward may be a trick. Set "
        "kl_limit or kl_target, raise kl_penalty_weight, or lower the learning rate; look at completions/."
    )


def _shrinking_responses(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    start, recent = _ends(history)
    before, now = (mean([result.response_length_mean for result in part]) for part in (start, recent))
    if not recent or now > before / 4 or now <= 1:
        return None
    return (
        f"Responses shrank from {before:.0f} tokens to {now:.1f}. If they should say more, the reward pays for "
        "silence: add a reward for what they should hold, or set min_new_tokens. Look at completions/."
    )


def _repeating_responses(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    recent = history[-PATIENCE:]
    if len(history) < 2 * PATIENCE or mean([result.distinct_fraction for result in history[:PATIENCE]]) < 0.9:
        return None
    if any(result.distinct_fraction > 0.5 for result in recent):
        return None
    return (
        f"Only {recent[-1].distinct_fraction:.0%} of the responses in the last batch differ from each other; at first "
        "nearly all did. Unless few answers are right, the policy repeats one that pays: add a reward for variety, set "
        "entropy_coef (0.01), or go back to best/."
    )


def _sampler_differs(history: History, config: TrainingConfig, generation: GenerationConfig) -> str | None:
    recent = history[-PATIENCE:]
    agrees = [r.effective_sample_size >= MIN_SAMPLE_SIZE and r.sampler_gap <= MAX_CORRECTED_GAP for r in recent]
    if len(recent) < PATIENCE or any(agrees):
        return None
    return (
        f"In the last {PATIENCE} iterations the sampler's log-probs differed from the trainer's by "
        f"{recent[-1].sampler_gap:.2g} nats per token; after correction the samples count as "
        f"{recent[-1].effective_sample_size:.0%} of their number. The sampler may hold old weights, or compute in a "
        "much lower precision: let it load the weights of every iteration, or sample in higher precision."
    )


FINDINGS: dict[str, _Finding] = {
    "no_rewards": _no_rewards,
    "constant_reward": _constant_reward,
    "single_response": _single_response,
    "equal_groups": _equal_groups,
    "all_cut_off": _all_cut_off,
    "never_ends": _never_ends,
    "stopped_ending": _stopped_ending,
    "empty_responses": _empty_responses,
    "entropy_collapse": _entropy_collapse,
    "beyond_budget": _beyond_budget,
    "objective_fell": _objective_fell,
    "reward_hacking": _reward_hacking,
    "kl_runaway": _kl_runaway,
    "shrinking_responses": _shrinking_responses,
    "repeating_responses": _repeating_responses,
    "sampler_differs": _sampler_differs,
}
