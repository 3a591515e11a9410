"""A job -> findings: its prompts, model, rewards and first steps, and what the whole run would take.

The figures come from training one or two iterations of the job itself, in a folder that is then removed.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from konic.doctor.findings import Finding
from konic.doctor.machine import available_memory
from konic.finetuning import KonicFinetuningAgent, KonicFinetuningCallback, KonicFinetuningEngine
from konic.finetuning.data.samples import Sample
from konic.finetuning.data.tokenization import encode_prompt
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.rewards.trial import try_rewards
from konic.finetuning.rollout.evaluation import respond
from konic.finetuning.run.session import Session

_MOST_LENGTHS = 1000
_TINY = 4
_UPDATES_COST = 1.5
"""An iteration takes about this many times as long as its sampling; only to choose what is tried."""
_SECONDS = 40.0
"""What the trial iterations may take."""
_MIB = 2**20


def examine_job(agent: KonicFinetuningAgent, max_iterations: int, device: str) -> Iterator[Finding]:
    """Yield the findings about a job. Nothing is written but in a temporary folder.

    Raises:
        KonicError: The job cannot run; the message says why.
    """
    held_out, every = agent.get_dataset_config().held_out, agent.get_training_config().eval_every
    tried = agent.with_settings(
        {"training_config": {"eval_every": None, "max_minutes": None}, "dataset_config": {"held_out": 0}}
    )
    with tempfile.TemporaryDirectory(prefix="konic-doctor-") as folder:
        engine = _engine(tried, folder, device)
        session = engine._current_session()
        session.check()
        started = time.monotonic()
        _ = session.learner
        loading_seconds = time.monotonic() - started
        yield _model(session, loading_seconds)
        yield _prompts(session)
        started = time.monotonic()
        samples = _tiny_rollout(session)
        tiny_seconds = time.monotonic() - started
        yield Finding("rollout", "ok", f"{len(samples)} responses in {tiny_seconds:.1f} s")
        yield from _rewards(session, samples)
        training = tried.get_training_config()
        predicted = _UPDATES_COST * tiny_seconds * training.batch_size / len(samples)
        share = _share_to_try(training, predicted)
        if share < training.batch_size:
            engine = _engine(tried.with_settings({"training_config": _smaller(training, share)}), folder, device)
        iterations = 2 if predicted < _SECONDS / 2 else 1
        started = time.monotonic()
        history = engine.train(iterations, save_every=0).history
        saving_seconds = time.monotonic() - started - sum(result.total_time_sec for result in history)
    yield _first_step(history[0])
    factor = training.batch_size / share
    yield _time(
        history,
        factor,
        max_iterations,
        _num_evaluated(held_out, every, max_iterations),
        loading_seconds,
        saving_seconds,
    )
    yield _memory(factor)


def _engine(agent: KonicFinetuningAgent, folder: str, device: str) -> KonicFinetuningEngine:
    place = Path(folder) / "run"
    return KonicFinetuningEngine.from_agent(
        agent, checkpoint_dir=place, device=device, callback=KonicFinetuningCallback(verbose=False)
    )


def _model(session: Session, seconds: float) -> Finding:
    policy = session.learner.policy
    learning = sum(weight.numel() for weight in policy.trainable().values())
    total = sum(weight.numel() for weight in policy.model.parameters())
    what = f"loaded in {seconds:.1f} s; {total / 1e6:.1f} M weights, of which {learning / 1e6:.2f} M learn"
    return Finding("model", "ok", what)


def _prompts(session: Session) -> Finding:
    most, tokenizer = session.generation.max_prompt_length, session.learner.policy.tokenizer
    rows = session.prompts.rows[:_MOST_LENGTHS]
    encoded = [(prompt, *encode_prompt(prompt, tokenizer, most)) for prompt in rows]
    lengths = [len(tokens) for _, tokens, _ in encoded]
    num_cut = sum(text != prompt.text for prompt, _, text in encoded)
    what = f"{len(session.prompts.rows)}, of {statistics.median(lengths):.0f} tokens (median), {max(lengths)} at most"
    numbers = {"count": len(session.prompts.rows), "examined": len(rows), "cut": num_cut, "longest": max(lengths)}
    if num_cut:
        what += f"; the start of {num_cut} of the first {len(rows)} is cut off"
        fix = f"Raise generation_config.max_prompt_length ({most}) if the model should read all of a prompt."
        return Finding("prompts", "warn", what, fix, numbers)
    return Finding("prompts", "ok", what, numbers=numbers)


def _tiny_rollout(session: Session) -> list[Sample]:
    learner, prompts = session.learner, session.prompts.batch(0, min(_TINY, len(session.prompts.rows)))
    tokens, seed = learner.special_tokens, session.training.seed
    return respond(learner.policy, learner.sampler, prompts, session.generation, tokens, seed)


def _rewards(session: Session, samples: list[Sample]) -> Iterator[Finding]:
    trial = try_rewards(session.agent.get_reward_composer(), samples)
    for reward in trial.rewards:
        what = f"{reward.milliseconds:.1f} ms per response"
        numbers = {"milliseconds": reward.milliseconds, "is_deterministic": reward.is_deterministic}
        if reward.faults:
            fix = "Try it with `konic rewards`; training_config.on_reward_error says what a run does then."
            yield Finding(f"reward {reward.name}", "fail", f"it failed: {reward.faults[0].what}", fix, numbers)
        elif not reward.is_deterministic:
            fix = "Make it return the same for the same response: the policy learns partly from noise."
            yield Finding(f"reward {reward.name}", "warn", f"{what}; a second call gave other values", fix, numbers)
        else:
            yield Finding(f"reward {reward.name}", "ok", f"{what}; a second call gave the same", numbers=numbers)


def _share_to_try(training: Any, predicted: float) -> int:
    """Return the number of responses of the iterations that are tried: all, or as many as the time allows."""
    group = training.responses_per_prompt
    if predicted <= _SECONDS:
        return int(training.batch_size)
    return max(group, int(training.batch_size * _SECONDS / predicted) // group * group)


def _smaller(training: Any, size: int) -> dict[str, Any]:
    return {"batch_size": size, "num_minibatches": 1 if size % training.num_minibatches else training.num_minibatches}


def _first_step(first: FinetuningIterationResult) -> Finding:
    """Return whether the policy starts as its reference, by which ratio and KL are those of the first step."""
    what = f"KL {first.kl_divergence:.4f} and largest log-ratio {first.first_log_ratio:.1e}"
    numbers = {"kl": first.kl_divergence, "first_log_ratio": first.first_log_ratio}
    if abs(first.kl_divergence) > 1e-3 or abs(first.first_log_ratio) > 1e-2:
        fix = "Both should be 0, up to rounding. With a half-precision dtype, try float32; else report it."
        return Finding("before the first step", "warn", what, fix, numbers)
    return Finding("before the first step", "ok", what, numbers=numbers)


def _num_evaluated(held_out: int, every: int | None, iterations: int) -> int:
    """Return how many responses to held-out prompts a run samples."""
    return held_out * (2 if not every else 1 + len(range(0, iterations, every)))


def _time(
    history: list[FinetuningIterationResult],
    factor: float,
    iterations: int,
    num_evaluated: int,
    loading: float,
    saving: float,
) -> Finding:
    last = history[-1]
    each = factor * last.total_time_sec
    per_response = last.generation_time_sec / last.num_samples
    whole = loading + saving + iterations * each + num_evaluated * per_response
    about = f"about {_clock(whole)} for {iterations} iterations of {each:.1f} s"
    if factor > 1:
        about = f"{about}, from a batch of {last.num_samples}"
    return Finding("time", "ok", about, numbers={"seconds": whole, "iteration_seconds": each})


def _memory(factor: float) -> Finding:
    try:
        import resource
    except ImportError:
        return Finding("peak memory", "ok", "this system does not say how much was taken")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    what = f"{peak / _MIB:.0f} MiB at the peak of this trial" + (", of a smaller batch" if factor > 1 else "")
    numbers, available = {"peak_bytes": peak}, available_memory()
    if available is not None and available < 0.2 * peak:
        fix = "Raise gradient_accumulation_steps, or lower batch_size or max_new_tokens."
        return Finding("peak memory", "warn", f"{what}; {available / _MIB:.0f} MiB are left", fix, numbers)
    return Finding("peak memory", "ok", what, numbers=numbers)


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
