"""A job -> findings: its prompts, model, rewards and first steps, and what the whole run would take.

The figures come from training two iterations of the job itself, one of a few responses and one of a whole batch or what
a time limit leaves of it, in a folder that is then removed.
"""

import contextlib
import ctypes
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from konic.doctor.findings import Finding
from konic.doctor.limits import decoding, limits, token_costs
from konic.finetuning import KonicFinetuningAgent, KonicFinetuningCallback, KonicFinetuningEngine, TrainingConfig
from konic.finetuning.agent import read_agent
from konic.finetuning.data.samples import Sample
from konic.finetuning.data.tokenization import encode_prompt
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.rewards.trial import try_rewards
from konic.finetuning.rollout.evaluation import respond
from konic.finetuning.run.session import Session
from konic.finetuning.system.memory import available_memory

_MOST_LENGTHS = 1000
_FEW = 4
"""Responses of the first trial."""
_SECONDS = 30.0
"""What the second trial may take, if it were as slow per response as the first."""
_MIB = 2**20


def examine_job(agent: KonicFinetuningAgent, max_iterations: int, device: str) -> Iterator[Finding]:
    """Yield the findings about a job. Nothing is written but in a temporary folder.

    Raises:
        KonicError: The job cannot run; the message says why.
    """
    held_out, every = agent.get_dataset_config().held_out, agent.get_training_config().eval_every
    tried = read_agent(agent).with_settings(  # also those that its class makes by itself
        {
            "training_config": {"eval_every": None, "max_minutes": None, "sharding": None, "sharded_sampling": None},
            "dataset_config": {"held_out": 0},
        }
    )
    training = tried.get_training_config()
    with tempfile.TemporaryDirectory(prefix="konic-doctor-") as folder:
        session = _engine(tried, folder, device)._current_session()
        session.check()
        model, loading_seconds = _model(session)
        yield model
        yield from filter(None, [decoding(session)])
        yield _prompts(session)
        started = time.monotonic()
        samples = _few_responses(session)
        yield Finding("rollout", "ok", f"{len(samples)} responses in {time.monotonic() - started:.1f} s")
        yield from _rewards(session, samples)
        costs = token_costs(session)
        del session, samples
        small = _try(tried, _whole_groups(_FEW, training), folder, device)
        most = int(small.result.num_samples * _SECONDS / small.result.total_time_sec)
        large = _try(tried, _whole_groups(most, training), folder, device)
    yield _first_step(small.result)
    seconds = _iteration_seconds(small.result, large.result, training.batch_size)
    num_evaluated = _num_evaluated(held_out, every, max_iterations)
    evaluation = num_evaluated * large.result.generation_time_sec / large.result.num_samples
    whole = loading_seconds + large.saving_seconds + evaluation + max_iterations * seconds
    yield _time(whole, seconds, max_iterations, large.result.num_samples, training.batch_size)
    yield from filter(None, [limits(costs, large.result)])
    yield _memory(large.result.num_samples < training.batch_size)


@dataclass(frozen=True)
class _Trial:
    """An iteration that was trained, and the seconds that opening and saving the run took."""

    result: FinetuningIterationResult
    saving_seconds: float


def _try(agent: KonicFinetuningAgent, size: int, folder: str, device: str) -> _Trial:
    """Train one iteration of `size` responses."""
    training = agent.get_training_config()
    if size < training.batch_size:
        steps = 1 if size % training.num_minibatches else training.num_minibatches
        agent = agent.with_settings({"training_config": {"batch_size": size, "num_minibatches": steps}})
    _give_back_memory()
    engine = _engine(agent, folder, device)
    engine.setup()
    started = time.monotonic()
    [result] = engine.train(1, save_every=0).history
    return _Trial(result, time.monotonic() - started - result.total_time_sec)


def _give_back_memory() -> None:
    """Return the memory of an earlier trial to the system: else the next one's peak would hold both."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def _whole_groups(size: int, training: TrainingConfig) -> int:
    """Return the number of responses nearest to `size` that are whole groups, at most a batch."""
    group = training.responses_per_prompt
    return min(max(group, size // group * group), training.batch_size)


def _iteration_seconds(small: FinetuningIterationResult, large: FinetuningIterationResult, batch_size: int) -> float:
    """Return the seconds of an iteration of `batch_size` responses, on the line through two trials.

    A step of sampling reads all weights, however many the responses are: the time is a fixed part and one per response.
    """
    more = large.num_samples - small.num_samples
    each = max(0.0, large.total_time_sec - small.total_time_sec) / more if more else 0.0
    return large.total_time_sec + (batch_size - large.num_samples) * each


def _engine(agent: KonicFinetuningAgent, folder: str, device: str) -> KonicFinetuningEngine:
    place = Path(tempfile.mkdtemp(dir=folder)) / "run"
    training = agent.get_training_config()
    if training.reward_resources is not None:  # there is no cluster here
        agent = read_agent(agent, training_config=training.with_fields({"reward_resources": None}))
    return KonicFinetuningEngine.from_agent(
        agent, checkpoint_dir=place, device=device, callback=KonicFinetuningCallback(verbose=False)
    )


def _model(session: Session) -> tuple[Finding, float]:
    """Load the model; return what it is and the seconds that it took."""
    started = time.monotonic()
    policy = session.learner.policy
    seconds = time.monotonic() - started
    learning = sum(weight.numel() for weight in policy.trainable().values())
    total = sum(weight.numel() for weight in policy.model.parameters())
    what = f"loaded in {seconds:.1f} s; {total / 1e6:.1f} M weights, of which {learning / 1e6:.2f} M learn"
    return Finding("model", "ok", what, numbers={"weights": total, "learning": learning}), seconds


def _prompts(session: Session) -> Finding:
    most, tokenizer = session.generation.max_prompt_length, session.learner.policy.tokenizer
    is_stream = session.prompts.stream is not None
    rows = session.prompts.batch(0, _MOST_LENGTHS) if is_stream else session.prompts.rows[:_MOST_LENGTHS]
    rows = rows[: len(session.prompts.rows)]  # a stream may end before
    encoded = [(prompt, *encode_prompt(prompt, tokenizer, most)) for prompt in rows]
    lengths = [len(tokens) for _, tokens, _ in encoded]
    num_cut = sum(text != prompt.text for prompt, _, text in encoded)
    count = f"a stream; the first {len(rows)}" if is_stream else str(len(session.prompts.rows))
    what = f"{count}, of {statistics.median(lengths):.0f} tokens (median), {max(lengths)} at most"
    numbers = {"count": len(session.prompts.rows), "examined": len(rows), "cut": num_cut, "longest": max(lengths)}
    if num_cut:
        what += f"; the start of {num_cut} of the first {len(rows)} is cut off"
        fix = f"Raise generation_config.max_prompt_length ({most}) if the model should read all of a prompt."
        return Finding("prompts", "warn", what, fix, numbers)
    return Finding("prompts", "ok", what, numbers=numbers)


def _few_responses(session: Session) -> list[Sample]:
    learner, prompts = session.learner, session.prompts.batch(0, min(_FEW, len(session.prompts.rows)))
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
        elif reward.is_silent:
            fix = "Is a `return` missing?"
            yield Finding(f"reward {reward.name}", "warn", "it returned None for every response", fix, numbers)
        elif not reward.is_deterministic:
            fix = "Make it return the same for the same response: the policy learns partly from noise."
            yield Finding(f"reward {reward.name}", "warn", f"{what}; a second call gave other values", fix, numbers)
        else:
            yield Finding(f"reward {reward.name}", "ok", f"{what}; a second call gave the same", numbers=numbers)


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


def _time(whole: float, iteration: float, iterations: int, tried: int, batch_size: int) -> Finding:
    about = f"about {_clock(whole)} for {iterations} iterations of {iteration:.1f} s"
    if tried < batch_size:
        about += f", from batches of {tried} and fewer"
    return Finding("time", "ok", about, numbers={"seconds": whole, "iteration_seconds": iteration})


def _memory(is_smaller: bool) -> Finding:
    try:
        import resource
    except ImportError:
        return Finding("peak memory", "ok", "this system does not say how much was taken")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    what = f"{peak / _MIB:.0f} MiB at the peak of this trial" + (", of a smaller batch" if is_smaller else "")
    numbers, available = {"peak_bytes": peak}, available_memory()
    if available is not None and available < 0.2 * peak:
        fix = "Raise gradient_accumulation_steps, or lower batch_size or max_new_tokens."
        return Finding("peak memory", "warn", f"{what}; {available / _MIB:.0f} MiB are left", fix, numbers)
    return Finding("peak memory", "ok", what, numbers=numbers)


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
