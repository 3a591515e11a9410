"""The run: builds the parts once and holds the one loop.

prompts → rollout → rewards → advantages → update → result → callbacks → checkpoint
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from konic.finetuning.agent import KonicFinetuningAgent
from konic.finetuning.algorithms import ALGORITHMS, advantages_of
from konic.finetuning.callbacks import BaseKonicFinetuningCallback, Callbacks
from konic.finetuning.checkpoint import (
    checkpoint_to_resume,
    environment,
    load_checkpoint,
    newest_checkpoint,
    read_record,
    require_same_run,
    snapshot,
)
from konic.finetuning.checks import new_findings, require_some_steps, require_sound_rollout, what_is_not_finite
from konic.finetuning.config import GenerationConfig, TrainingConfig
from konic.finetuning.dataset import Prompt, PromptSet, load_prompts, make_prompts
from konic.finetuning.errors import ConfigError, NotFiniteError, OutputError, TrainingError, did_you_mean
from konic.finetuning.evaluation import evaluate, respond
from konic.finetuning.folders import written_into
from konic.finetuning.interrupts import SigtermHandler, sigterm_as_interrupt, uninterrupted
from konic.finetuning.intervals import mean
from konic.finetuning.learner import Learner, build_learner
from konic.finetuning.measures import RunClock, StageClock, iteration_result
from konic.finetuning.models import check_model_kwargs, pick_device
from konic.finetuning.moments import RunningMoments
from konic.finetuning.paths import as_path
from konic.finetuning.prompts import PromptBatch, make_prompt_batch
from konic.finetuning.results import Evaluation, FinetuningIterationResult, FinetuningResult, Selection
from konic.finetuning.rollout import Rollout, rollout, with_values_shifted
from konic.finetuning.run_folder import RunFolder
from konic.finetuning.sampling import RandomKey
from konic.finetuning.saving import Saving
from konic.finetuning.scoring import Scorer, Scores, moments_of
from konic.finetuning.state import TrainerState
from konic.finetuning.update import Schedule, update

logger = logging.getLogger(__name__)

INTERRUPTED = "interrupted"


class KonicFinetuningEngine:
    """Trains an agent's model by reinforcement learning, and samples, evaluates and saves it.

    Args:
        agent: What to train.
        checkpoint_dir: The run's folder; None makes a new one under `runs/`.
        device: "auto" (CUDA if there is one, else the CPU), or a torch device such as "cpu" or "cuda:0".
        callback: One callback or a list; see BaseKonicFinetuningCallback.
    """

    def __init__(
        self,
        agent: KonicFinetuningAgent,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        device: str = "auto",
        callback: BaseKonicFinetuningCallback | Sequence[BaseKonicFinetuningCallback] | None = None,
    ) -> None:
        if not isinstance(agent, KonicFinetuningAgent):
            raise ConfigError(f"KonicFinetuningEngine.from_agent takes a KonicFinetuningAgent, got {agent!r}.")
        self.agent = agent
        self.checkpoint_dir = checkpoint_dir
        self.device = device
        self.callback = callback
        self._built: Learner | None = None
        self._loaded_prompts: PromptSet | None = None
        self._prompts_sha256: str | None = None
        self._folder: RunFolder | None = None
        self._folder_named = checkpoint_dir
        self._state = TrainerState()
        self._scorer = Scorer(agent.get_reward_composer(), agent.get_training_config())
        self._weights_are_whole = True
        check_model_kwargs(agent.get_model_kwargs())
        pick_device(device)
        if checkpoint_dir is not None:
            as_path(checkpoint_dir, "checkpoint_dir", OutputError)

    @classmethod
    def from_agent(cls, agent: KonicFinetuningAgent, **options: Any) -> Self:
        """An engine for an agent; options are those of the class: checkpoint_dir, device, callback."""
        known = ("checkpoint_dir", "device", "callback")
        for name in options:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(f"from_agent has no option {name!r}.{hint} It has: {', '.join(known)}.")
        return cls(agent, **options)

    def train(
        self,
        max_iterations: int = 100,
        save_every: int | None = None,
        resume_from_checkpoint: bool | str | os.PathLike[str] | None = None,
        *,
        save_total_limit: int | None = None,
        allow_changes: bool = False,
    ) -> FinetuningResult:
        """Run iterations of sampling, scoring and updating; called again, it goes on.

        A checkpoint is also written at the end, after Ctrl-C, and after SIGTERM, which then ends the process.

        Args:
            max_iterations: Iterations to do; with `resume_from_checkpoint`, the total.
            save_every: Write a checkpoint every so many iterations; None writes one when ten minutes have passed.
            resume_from_checkpoint: True for the newest whole checkpoint in `checkpoint_dir`, or a checkpoint's folder.
            save_total_limit: Keep so many checkpoints, the newest; None keeps all.
            allow_changes: Resume with other settings than the checkpoint's, which makes it another run.

        Raises:
            KonicError: Something the user can mend; up to the last whole iteration nothing is lost.
        """
        callbacks = Callbacks(self.callback)
        with contextlib.ExitStack() as held:
            sigterm = held.enter_context(sigterm_as_interrupt())
            held.enter_context(self._scorer)
            self._check(max_iterations, save_every, save_total_limit)
            folder, last = self._prepare(held, max_iterations, resume_from_checkpoint, allow_changes)
            saving = Saving(
                folder, self._learner, self._state, callbacks, lambda: self._settings(last), save_every,
                save_total_limit, saved_iteration=self._state.iteration or None,
            )  # fmt: skip
            callbacks.on_train_begin(self._settings(last))
            for result in self._state.history if resume_from_checkpoint else ():
                callbacks.should_stop_early(result)
            with callbacks.told_of_errors():
                try:
                    stopped = self._iterate(folder, callbacks, saving, last, sigterm)
                except BaseException as error:
                    if not isinstance(error, KeyboardInterrupt) or not self._weights_are_whole:
                        with uninterrupted():
                            saving.after_error(self._result(None, None), self._weights_are_whole)
                        raise
                    stopped = INTERRUPTED
                return self._finish(folder, callbacks, saving, last, stopped)

    def _iterate(
        self, folder: RunFolder, callbacks: Callbacks, saving: Saving, last: int, sigterm: SigtermHandler
    ) -> str | None:
        """The loop, up to iteration `last`; why it ended before, or None."""
        config, generation = self._training, self._generation
        learner, prompts, state = self._learner, self._prompts, self._state
        clock = RunClock(state.elapsed_seconds, config.max_minutes)
        for iteration in range(state.iteration + 1, last + 1):
            sigterm.check()
            callbacks.on_iteration_begin(iteration)
            evaluation = self._evaluate_held_out(folder, state.iteration) if self._is_evaluated(iteration) else None
            stages = StageClock()

            batch = self._batch(prompts, iteration)
            callbacks.on_generation_begin(list(batch.texts))

            key = RandomKey(config.seed, iteration)
            rolled = rollout(learner.policy, batch, generation, learner.special, key, config.micro_batch_size)
            if config.self_checks:
                require_sound_rollout(rolled, iteration)
            stages.lap("generation")
            callbacks.on_generation_end(list(batch.texts), list(rolled.texts))

            scores = self._scorer.score(batch.prompts, batch.texts, rolled.texts, state.reward_moments, learns=True)
            self._scorer.require_few_faults(state.history, scores)
            scores = self._usable(rolled, scores)
            stages.lap("reward")
            callbacks.on_reward_computed(list(scores.rewards), {name: list(v) for name, v in scores.breakdown.items()})

            shift = self._shift_of_values(scores)
            rolled = with_values_shifted(rolled, shift)
            kl_weight = state.kl_penalty_weight(self.agent.kl_penalty_weight, config)
            advantages = advantages_of(rolled, scores, config, kl_weight)

            with uninterrupted():
                best = snapshot(learner.policy) if self._is_best(rolled, scores, evaluation) else state.best_weights
                with self._changing_weights():
                    learner.policy.shift_values(shift)
                    schedule = self._schedule(iteration, last)
                    stats = update(learner.policy, learner.optimizer, rolled, advantages, config, schedule)
                    if iteration == 1:
                        learner.policy.check_reference()
                stages.lap("update")

                result = self._checked(
                    iteration_result(iteration, rolled, scores, advantages, stats, kl_weight, stages, evaluation)
                )
                state.add(result, config.steps_per_iteration, clock.elapsed_seconds, scores.moments)
                state.best_weights = best
                folder.write_iteration(result, rolled, scores)
                require_some_steps(state.history)

                callbacks.on_iteration_end(result)
                saving.after_iteration()

            stopped = _reason_to_stop(result, callbacks, clock)
            if stopped and iteration < last:
                return stopped
        return None

    def evaluate(self, prompts: Sequence[Any] | None = None) -> dict[str, Any]:
        """Responses to prompts and what they are worth, with the same random numbers every time.

        Args:
            prompts: Strings, lists of chat messages, or dicts with columns; None takes the dataset's held-out prompts.

        Returns:
            prompts, responses, rewards, reward_mean, reward_breakdown (each reward's mean), and per response
            kl_per_response (nats) and response_lengths (tokens).
        """
        chosen = self._prompts.held_out if prompts is None else self._made(prompts, "evaluate(prompts)")
        if not chosen:
            raise ConfigError("evaluate() has no prompts: give some, or set DatasetConfig(held_out=...).")
        with self._scorer:
            return self._evaluation(chosen, self._state.reward_moments, self._state.num_steps == 0).to_dict()

    def generate(self, prompts: Sequence[Any]) -> list[str]:
        """A response to every prompt, with the same random numbers every time."""
        made, learner = self._made(prompts, "generate(prompts)"), self._learner
        answered = respond(learner.policy, made, self._generation, learner.special, self._training.seed)
        return [text for _, samples in answered for text in samples.texts]

    def save_pretrained(self, path: str | os.PathLike[str], merge: bool = False) -> None:
        """Write the model, tokenizer and a model card into a folder that PEFT and `transformers` load.

        Args:
            path: The folder; what is there already is replaced.
            merge: True writes a full model with the adapter merged in, False the adapter (or the full model).
        """
        folder, result = as_path(path, "save_pretrained(path)", OutputError), self._result(None, None)
        with written_into(folder) as target:
            self._learner.write(target, result, self._settings(self._state.iteration), merge)

    @property
    def _training(self) -> TrainingConfig:
        return self.agent.get_training_config()

    @property
    def _generation(self) -> GenerationConfig:
        return self.agent.get_generation_config()

    @property
    def _learning_rate(self) -> float:
        return self._training.peak_learning_rate(uses_lora=self._learner.policy.uses_lora)

    def _usable(self, rolled: Rollout, scores: Scores) -> Scores:
        """The scores; marked as dropped where a number of the batch is not finite and on_nonfinite is "skip"."""
        wrong = what_is_not_finite(rolled, scores, self._learner.policy)
        if wrong is None:
            return scores
        if self._training.on_nonfinite == "stop":
            raise NotFiniteError(f"{wrong} Nothing was updated.")
        logger.warning("A batch is dropped (on_nonfinite='skip'): %s", wrong)
        return replace(scores, is_dropped=True, moments=self._state.reward_moments)

    def _shift_of_values(self, scores: Scores) -> float:
        """What the value head lacks of the mean score, at the first batch that has one."""
        seen = any(result.num_unscored < result.num_samples for result in self._state.history)
        if seen or scores.is_dropped or not scores.scored() or not ALGORITHMS[self._training.algorithm].learns_values:
            return 0.0
        return mean(scores.scored()) - self._learner.policy.value_head.bias.item()

    @property
    def _selection(self) -> Selection:
        return Selection(self._training.eval_every is not None, self._training.kl_budget)

    @property
    def _learner(self) -> Learner:
        device = pick_device(self.device)
        if self._built is None:
            self._built = build_learner(self.agent, device)
        elif self._built.policy.device.type != device.type:
            raise ConfigError(f"device={self.device!r}: the model is already on {self._built.policy.device}.")
        return self._built

    @property
    def _prompts(self) -> PromptSet:
        if self._loaded_prompts is None:
            self._loaded_prompts = load_prompts(self.agent.get_dataset_config())
            self._prompts_sha256 = self._loaded_prompts.fingerprint()
        return self._loaded_prompts

    def _evaluation(
        self, prompts: Sequence[Prompt], moments: Mapping[str, RunningMoments], untrained: bool
    ) -> Evaluation:
        learner, seed = self._learner, self._training.seed
        return evaluate(
            learner.policy, self._scorer, prompts, self._generation, learner.special, seed, moments, untrained
        )

    def _is_evaluated(self, iteration: int) -> bool:
        """True where the policy that samples an iteration is tried on the held-out prompts first."""
        every = self._training.eval_every
        return bool(self._prompts.held_out and every and (iteration - 1) % every == 0)

    def _is_best(self, rolled: Rollout, scores: Scores, evaluation: Evaluation | None) -> bool:
        """True where the policy that sampled is the best so far: on held-out prompts with eval_every, else by batch."""
        if scores.is_dropped:
            return False
        if not self._selection.on_held_out:
            reward, kl = mean(scores.scored()), rolled.kl.sum(dim=1).mean().item()
        elif evaluation is not None:
            reward, kl = evaluation.reward_mean, mean(evaluation.kl_per_response)
        else:
            return False
        return self._state.is_best(reward, kl, self._selection)

    def _schedule(self, iteration: int, last: int) -> Schedule:
        config = self._training
        total = last * config.steps_per_iteration
        moves_policy = iteration > config.value_warmup_iterations
        return Schedule(self._state.num_steps, total, self._learning_rate, moves_policy)

    def _checked(self, result: FinetuningIterationResult) -> FinetuningIterationResult:
        """The result with the names of what it shows for the first time, after telling it."""
        if not self._training.self_checks:
            return result
        findings = new_findings([*self._state.history, result], self._training, self._generation)
        for message in findings.values():
            logger.warning("Iteration %d: %s", result.iteration, message)
        return replace(result, checks=tuple(findings))

    def _evaluate_held_out(self, folder: RunFolder, iterations_done: int) -> Evaluation:
        """The held-out prompts tried; normalised rewards are on the scale of the first time, so that all compare.

        After 0 iterations the policy is its reference, so that this can be done at any time.
        """
        first = folder.read_evaluation(0) if iterations_done else None
        moments = moments_of(self.agent.get_reward_composer(), first)
        evaluation = self._evaluation(self._prompts.held_out, moments, untrained=iterations_done == 0)
        folder.write_evaluation(iterations_done, evaluation)
        return evaluation

    def _made(self, prompts: Sequence[Any], where: str) -> list[Prompt]:
        if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
            raise ConfigError(f"{where} takes a list of prompts, got {type(prompts).__name__}.")
        return make_prompts(list(prompts), self.agent.get_dataset_config(), where)

    def _batch(self, prompts: PromptSet, iteration: int) -> PromptBatch:
        """The prompts of an iteration, each as often as it gets responses."""
        config, learner = self._training, self._learner
        count, repeats = config.prompts_per_iteration, config.responses_per_prompt
        chosen = [p for p in prompts.batch((iteration - 1) * count, count) for _ in range(repeats)]
        length = self._generation.max_prompt_length
        return make_prompt_batch(chosen, learner.policy.tokenizer, length, learner.special.pad, learner.policy.device)

    def _prepare(
        self,
        held: contextlib.ExitStack,
        max_iterations: int,
        resume: bool | str | os.PathLike[str] | None,
        allow_changes: bool,
    ) -> tuple[RunFolder, int]:
        """The run's folder, locked and cut back to where the run goes on, and its last iteration; the model loaded."""
        checkpoint = checkpoint_to_resume(resume, self.checkpoint_dir) if resume is not True else None
        folder = self._open_folder(checkpoint, resume is True)
        held.callback(folder.take_back_if_unused)
        folder.prepare()
        held.enter_context(folder.locked())
        if resume is True:
            checkpoint = self._newest_checkpoint(folder)
        elif checkpoint is None and not self._state.iteration:
            folder.require_no_run()
        record = read_record(checkpoint) if checkpoint is not None else None
        learner = self._learner
        if checkpoint is not None and record is not None:
            require_same_run(checkpoint, record, self._settings(max_iterations), learner.policy.device, allow_changes)
            self._state = load_checkpoint(checkpoint, learner.policy, learner.optimizer)
            folder.go_back_to(self._state.history)
            self._read_stream_again()
        last = max_iterations if resume else self._state.iteration + max_iterations
        folder.write_run(self._settings(last), environment(learner.policy.device), self.agent.get_reward_composer())
        return folder, last

    def _newest_checkpoint(self, folder: RunFolder) -> Path | None:
        """The checkpoint to go on from, or None after emptying the folder of a run that ended before its first."""
        if not folder.holds_no_checkpoint_yet or self._state.iteration:
            return newest_checkpoint(folder.path)
        logger.warning("%s: the run ended before its first checkpoint. It begins anew.", folder.path)
        folder.go_back_to([])
        return None

    def _read_stream_again(self) -> None:
        """Read a streamed dataset up to where the run stood, and say what that took."""
        if self._prompts.stream is not None:
            start, num_rows = time.monotonic(), self._state.iteration * self._training.prompts_per_iteration
            self._prompts.batch(num_rows, 0)
            logger.warning("Read %d rows of the stream again: %.1f s.", num_rows, time.monotonic() - start)

    def _check(self, max_iterations: int, save_every: int | None, save_total_limit: int | None) -> None:
        """Everything that can be known to fail, or to be worth a warning, before the model is loaded."""
        counts = {"max_iterations": max_iterations, "save_every": save_every, "save_total_limit": save_total_limit}
        for name, value in counts.items():
            may_be_none = name != "max_iterations"
            is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if not (is_count or (value is None and may_be_none)):
                raise ConfigError(f"train({name}={value!r}): it must be a whole number of at least 1.")
        if not self._weights_are_whole:
            raise TrainingError(
                "An error in an update left this engine's weights between two iterations. Make a new engine; with a "
                "checkpoint, go on with train(resume_from_checkpoint=...)."
            )
        if self._training.kl_target is not None and self.agent.kl_penalty_weight == 0:
            raise ConfigError("kl_target steers kl_penalty_weight by factors: start it above 0, such as 0.05.")
        first = self._prompts.rows[0]
        chat = [] if isinstance(first.content, str) else ["messages"]
        self.agent.get_reward_composer().check_columns(dict.fromkeys([*first.columns, *chat]))
        if self._generation.distribution_filters:
            logger.warning(
                "Sampling with %s draws from another distribution than the one trained: the ratio and the KL shown "
                "describe the unfiltered policy.",
                ", ".join(self._generation.distribution_filters),
            )

    def _open_folder(self, checkpoint: Path | None, resumes_newest: bool) -> RunFolder:
        """The run's folder: the one named, the checkpoint's, the one in use, or a new one."""
        if resumes_newest and self.checkpoint_dir is None:
            raise ConfigError("train(resume_from_checkpoint=True) needs checkpoint_dir, the run's folder.")
        if self._folder is None or self.checkpoint_dir != self._folder_named:
            given = checkpoint.parent if checkpoint is not None else None
            self._folder = RunFolder.named(self.checkpoint_dir or given, self.agent.get_base_model())
            self._folder_named = self.checkpoint_dir
        if checkpoint is not None and checkpoint.parent != self._folder.path and self._folder.holds_a_run:
            raise OutputError(f"{self._folder.path}: holds another run than {checkpoint}. Name another folder.")
        return self._folder

    def _settings(self, last: int) -> dict[str, Any]:
        """Every setting of the run by name, as plain values; what `on_train_begin` gets and `run.json` keeps."""
        more = {
            "max_iterations": last,
            "iterations_done": self._state.iteration,
            "selection": asdict(self._selection),
            "prompts_sha256": self._prompts_sha256,
            "base_sha256": self._learner.base_sha256,
        }
        return self.agent.settings(uses_lora=self._learner.policy.uses_lora) | more

    @contextlib.contextmanager
    def _changing_weights(self) -> Iterator[None]:
        """From its first optimizer step on the weights are between two iterations; an error then spoils the engine."""

        def first_step(*_: Any) -> None:
            self._weights_are_whole = False

        hook = self._learner.optimizer.register_step_pre_hook(first_step)
        bias = self._learner.policy.value_head.bias
        bias_before = bias.detach().clone()
        try:
            yield
        except BaseException:
            if self._weights_are_whole:
                bias.data = bias_before  # no step was taken: what the shift of the values did is undone
            raise
        finally:
            hook.remove()
        self._weights_are_whole = True

    def _finish(
        self, folder: RunFolder, callbacks: Callbacks, saving: Saving, last: int, stopped: str | None
    ) -> FinetuningResult:
        """Write the last checkpoint, the final and the best model; then try the held-out prompts once more."""
        final = folder.path / "final"
        result = self._result(str(final), stopped)
        with contextlib.suppress(KeyboardInterrupt), uninterrupted():
            saving.final(result)
        if self._prompts.held_out and stopped != INTERRUPTED:
            with contextlib.suppress(KeyboardInterrupt):
                before = folder.read_evaluation(0) or self._evaluate_held_out(folder, 0)
                after = self._evaluate_held_out(folder, self._state.iteration)
                if before.prompts != after.prompts:  # it was of other data
                    before = self._evaluate_held_out(folder, 0)
                    after = self._evaluate_held_out(folder, self._state.iteration)
                result = replace(result, before=before, after=after)
                self._learner.write_card(final, result, self._settings(last))
        callbacks.on_train_end(result)
        return result

    def _result(self, model_path: str | None, stopped: str | None) -> FinetuningResult:
        state, name = self._state, self.agent.get_base_model()
        return FinetuningResult(name, list(state.history), state.elapsed_seconds, model_path, stopped, self._selection)


def _reason_to_stop(result: FinetuningIterationResult, callbacks: Callbacks, clock: RunClock) -> str | None:
    if callbacks.should_stop_early(result):
        return f"a callback asked for it at iteration {result.iteration}"
    return "max_minutes passed" if clock.time_is_up else None
