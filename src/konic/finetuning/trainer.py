"""Session -> trained weights: the loop, and the steps of one iteration.

prompts → rollout → rewards → advantages → update → result → callbacks → checkpoint
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from konic.finetuning.callbacks.composite import Callbacks
from konic.finetuning.data.prompts import Prompt
from konic.finetuning.data.tokenization import PromptBatch, make_prompt_batch, warn_of_cuts
from konic.finetuning.errors import NotFiniteError
from konic.finetuning.learning.estimators import (
    Advantages,
    compute_advantages,
    in_equal_group,
    mean_penalty,
    reasons_left_out,
    rows_to_learn_from,
)
from konic.finetuning.learning.kl_controller import limited_kl_weight
from konic.finetuning.learning.schedule import Schedule
from konic.finetuning.learning.update import UpdateStats, update
from konic.finetuning.models.value_head import shift_values
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.results.intervals import mean, spread
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.rewards.moments import RunningMoments
from konic.finetuning.rewards.scoring import Scores, join_scores, require_fitting
from konic.finetuning.rollout.rollout import Rollout, sample_rollout
from konic.finetuning.rollout.rows import join_rollouts, select_rows
from konic.finetuning.rollout.sampler import RandomKey
from konic.finetuning.run.checkpoint import remember, snapshot
from konic.finetuning.run.checks import new_findings
from konic.finetuning.run.invariants import find_nonfinite, require_not_all_dropped, require_sound_rollout
from konic.finetuning.run.measures import RunClock, StageClock, iteration_result
from konic.finetuning.run.saving import Saver
from konic.finetuning.run.session import Session
from konic.finetuning.system.signals import uninterrupted
from konic.finetuning.system.world import from_first
from konic.output import get_logger

logger = get_logger(__name__)


class Trainer:
    """Runs the iterations of a session up to `last_iteration`."""

    def __init__(
        self,
        session: Session,
        callbacks: Callbacks,
        saver: Saver,
        last_iteration: int,
    ) -> None:
        self._session, self._callbacks, self._saver = session, callbacks, saver
        self._last_iteration = last_iteration
        self._has_warned_of_cuts = False

    def run(self) -> str | None:
        """Run the remaining iterations. Returns why it stopped before the last one, or None."""
        session, callbacks, state = self._session, self._callbacks, self._session.state
        run_clock = RunClock(state.elapsed_seconds, session.training.max_minutes)
        for iteration in range(state.iteration + 1, self._last_iteration + 1):
            callbacks.on_iteration_begin(iteration)
            evaluation = self._evaluate_if_due(iteration)
            stage_clock = StageClock()

            rollout, scores = self._sample_and_score(iteration, stage_clock)
            value_shift = self._value_shift(scores)
            rollout = replace(rollout, values=shift_values(rollout.values, rollout.response_mask, value_shift))
            kl_weight = self._kl_weight(rollout)
            varied = state.scores_have_varied(scores.valid_rewards())
            rows = rows_to_learn_from(rollout, scores, session.training)
            learned = select_rows(rollout, rows)
            advantages = compute_advantages(learned, scores.select(rows), session.training, kl_weight, varied)

            with uninterrupted():  # Ctrl-C waits, so that an iteration counts as a whole or not at all
                # the best weights are those that sampled, so they are copied before the update
                penalty = mean_penalty(rollout, scores, session.training)
                is_best = self._is_best(rollout, scores, penalty, evaluation)
                before_update = snapshot(session.learner.policy) if is_best else None
                stats = self._update(iteration, learned, advantages, value_shift)
                stage_clock.lap("update")

                left_out = reasons_left_out(rollout, scores, session.training)
                result = iteration_result(
                    iteration, rollout, scores, advantages, stats, session.selection, penalty, kl_weight, stage_clock,
                    evaluation, left_out,
                )  # fmt: skip
                result = self._with_findings(result)
                state.add(
                    result,
                    num_steps=session.training.steps_per_iteration,
                    num_prompts=len(rollout.batch) // session.training.responses_per_prompt,
                    group_spreads=self._group_spreads(rollout, scores),
                    elapsed_seconds=run_clock.elapsed_seconds,
                    reward_moments=scores.moments,
                    best_weights=state.best_weights if before_update is None or result.was_dropped else before_update,
                )
                session.folder.write_iteration(result, rollout, scores, left_out, advantages, rows)
                require_not_all_dropped(state.history)
                callbacks.on_iteration_end(result)
                state.reward_weights = session.reward_weights.current
                self._saver.after_iteration()

            stopped = self._reason_to_stop(result, run_clock)
            if stopped and iteration < self._last_iteration:
                return stopped
        return None

    def _evaluate_if_due(self, iteration: int) -> Evaluation | None:
        """The policy on the held-out prompts, before it samples; every `eval_every` iterations, else None."""
        every = self._session.training.eval_every
        if not self._session.prompts.held_out or not every or (iteration - 1) % every:
            return None
        return self._session.evaluate_held_out(iterations_done=iteration - 1)

    def _sample_and_score(self, iteration: int, clock: StageClock) -> tuple[Rollout, Scores]:
        """The responses of an iteration and their scores: one round, or more to replace groups of equal scores."""
        config, moments = self._session.training, self._session.state.reward_moments
        rounds: list[tuple[Rollout, Scores]] = []
        missing = config.prompts_per_iteration
        for _ in range(1 + config.resampling_budget if config.filter_equal_groups else 1):
            earlier = [prompt for rollout, _ in rounds for prompt in rollout.batch.prompts]
            batch = self._next_prompts(missing, earlier)
            self._callbacks.on_generation_begin(list(batch.texts))
            rollout = self._sample(batch, iteration)
            clock.lap("generation")
            self._callbacks.on_generation_end(list(batch.texts), rollout.texts)

            scores = self._score(rollout, moments)
            clock.lap("reward")
            self._callbacks.on_reward_computed(scores.rewards, scores.breakdown)
            rounds.append((rollout, scores))
            moments = scores.moments
            if not config.filter_equal_groups or scores.is_dropped:
                break
            missing = int(in_equal_group(rollout, scores, config).sum()) // config.responses_per_prompt
            if not missing:
                break
        return join_rollouts([rollout for rollout, _ in rounds]), join_scores([scores for _, scores in rounds])

    def _next_prompts(self, count: int, earlier: Sequence[Prompt]) -> PromptBatch:
        """The next prompts of the run, each repeated once for every response that it gets.

        `earlier` are those that this iteration has already taken, repeats included.
        """
        config, learner, state = self._session.training, self._session.learner, self._session.state
        repeats = config.responses_per_prompt
        start = state.num_prompts + len(earlier) // repeats
        prompts = self._session.prompts.batch(start, count, state.group_spreads)
        chosen = [prompt for prompt in prompts for _ in range(repeats)]
        length, pad = self._session.generation.max_prompt_length, learner.special_tokens.pad
        batch = make_prompt_batch(chosen, learner.policy.tokenizer, length, pad, learner.policy.device, earlier)
        if not self._has_warned_of_cuts:  # once in a run
            self._has_warned_of_cuts = warn_of_cuts(batch, length)
        return batch

    def _group_spreads(self, rollout: Rollout, scores: Scores) -> dict[str, float]:
        """By dataset row, how much the scores of its group differ; empty unless the prompts are chosen by that."""
        if not self._session.prompts.prefers_undecided or scores.is_dropped:
            return {}
        size = self._session.training.responses_per_prompt
        groups = (slice(start, start + size) for start in range(0, len(scores.rewards), size))
        return {str(rollout.batch.prompts[group.start].row): spread(scores.rewards[group]) for group in groups}

    def _sample(self, batch: PromptBatch, iteration: int) -> Rollout:
        config, learner = self._session.training, self._session.learner
        rollout = sample_rollout(
            learner.policy,
            self._session.sampler,
            batch,
            self._session.generation,
            learner.special_tokens,
            RandomKey(config.seed, iteration),
            config.micro_batch_size,
            self._session.world,
        )
        if self._session.served_check is not None:
            self._session.served_check.require_current(rollout, iteration)
        if config.self_checks:
            require_sound_rollout(rollout, iteration)
        return rollout

    def _score(self, rollout: Rollout, moments: dict[str, RunningMoments]) -> Scores:
        """The rewards. They are marked as dropped if a number is not finite and on_nonfinite is "skip"."""
        session = self._session
        scores = session.scorer.score(rollout.records, moments, update_moments=True)
        session.scorer.require_error_rate(session.state.history, scores)
        require_fitting(scores, session.training, rollout.batch.prompts)
        problem = find_nonfinite(rollout, scores, session.learner.policy)
        if problem is None:
            return scores
        if session.training.on_nonfinite == "stop":
            raise NotFiniteError(f"{problem} Nothing was updated.")
        logger.warning("A batch is dropped (on_nonfinite='skip'): %s", problem)
        return replace(scores, is_dropped=True, moments=moments)

    def _value_shift(self, scores: Scores) -> float:
        """How much every value is shifted: at the first batch that has a score, and 0 at all others."""
        config, state = self._session.training, self._session.state
        has_started = any(not r.was_dropped and r.num_unscored < r.num_samples for r in state.history)
        if has_started or scores.is_dropped or not config.algorithm_row.learns_values:
            return 0.0
        return self._session.learner.policy.value_head.starting_shift(scores.valid_rewards())

    def _kl_weight(self, rollout: Rollout) -> float:
        """β of this iteration: the agent's, adapted by kl_target, or raised as the KL of this batch nears kl_limit."""
        config = self._session.training
        weight = self._session.state.kl_penalty_weight(self._session.agent.kl_penalty_weight, config)
        if config.kl_limit is None or config.kl_target is not None:
            return weight
        return limited_kl_weight(weight, rollout.kl.sum(dim=1).mean().item(), config.kl_limit)

    def _is_best(self, rollout: Rollout, scores: Scores, penalty: float, evaluation: Evaluation | None) -> bool:
        """True if the policy that sampled is the best so far, on held-out prompts (eval_every) or else its batch."""
        selection = self._session.selection
        if scores.is_dropped:
            return False
        if not selection.on_held_out:
            reward, kl = mean(scores.valid_rewards()) - penalty, rollout.kl.sum(dim=1).mean().item()
        elif evaluation is not None:
            reward, kl = evaluation.reward_mean, mean(evaluation.kl_per_response)
        else:
            return False
        return self._session.state.is_best(reward, kl, selection)

    def _update(self, iteration: int, rollout: Rollout, advantages: Advantages, value_shift: float) -> UpdateStats:
        learner, config = self._session.learner, self._session.training
        state = self._session.state
        schedule = Schedule(
            first_step=state.num_steps,
            total_steps=state.num_steps + (self._last_iteration - state.iteration) * config.steps_per_iteration,
            falls_from=state.falls_from,
            peak=config.peak_learning_rate(uses_lora=learner.policy.uses_lora),
            train_policy=iteration > config.value_warmup_iterations,
        )
        with self._changing_weights(), learner.policy.value_head.shifted(value_shift):
            stats = update(
                learner.policy, learner.optimizer, rollout, advantages, config, schedule, world=self._session.world
            )
            if iteration == 1:  # an adapter that changes the base model does so at its first step
                learner.policy.check_reference()
        return stats

    @contextlib.contextmanager
    def _changing_weights(self) -> Iterator[None]:
        """Let an error in an update undo it: `session.weights_are_whole` says whether it did.

        An adapter is copied for that. Where every weight is trained, the copy would take too much memory.
        """
        session, learner = self._session, self._session.learner
        put_back = remember(learner.policy, learner.optimizer) if learner.policy.uses_lora else None

        def mark(*_: Any) -> None:
            session.weights_are_whole = False

        hook = learner.optimizer.register_step_pre_hook(mark)
        try:
            yield
        except BaseException:
            if put_back is not None and not session.weights_are_whole:
                put_back()
                session.weights_are_whole = True
            raise
        finally:
            hook.remove()
        session.weights_are_whole = True

    def _with_findings(self, result: FinetuningIterationResult) -> FinetuningIterationResult:
        """The result with the self-checks that fail for the first time; the message of each is also a warning."""
        session = self._session
        if not session.training.self_checks:
            return result
        # batches of ever harder prompts cannot be compared
        unfit = ("objective_fell",) if session.prompts.prefers_undecided else ()
        findings = new_findings([*session.state.history, result], session.training, session.generation, unfit)
        for message in findings.values():
            logger.warning("Iteration %d: %s", result.iteration, message)
        return replace(result, checks=tuple(findings), check_messages=findings)

    def _reason_to_stop(self, result: FinetuningIterationResult, clock: RunClock) -> str | None:
        reason = "max_minutes passed" if clock.time_is_up else None
        if self._callbacks.should_stop_early(result):
            reason = f"a callback asked for it at iteration {result.iteration}"
        return from_first(self._session.world, reason)
