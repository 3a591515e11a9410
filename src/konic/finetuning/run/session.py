"""Agent -> Session: the parts of a run, built at first use, and its life from opening the folder to the last file."""

import contextlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from konic.finetuning.agent import KonicFinetuningAgent, read_agent
from konic.finetuning.callbacks.composite import Callbacks
from konic.finetuning.config import GenerationConfig, TrainingConfig
from konic.finetuning.data.prompts import Prompt, PromptSet, load_prompts
from konic.finetuning.data.samples import collect_columns
from konic.finetuning.errors import ConfigError, OutputError, RewardError, TrainingError
from konic.finetuning.learning.learner import Learner, build_learner
from konic.finetuning.learning.schedule import ENDS_AT_ZERO
from konic.finetuning.models.adapter_config import own_settings
from konic.finetuning.models.decode_probe import choose_plan
from konic.finetuning.models.loading import pick_device
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.prepacked import DecodePlan
from konic.finetuning.models.sharding import NOT_SHARDED
from konic.finetuning.results.evaluation import Evaluation
from konic.finetuning.results.summary import FinetuningResult, Selection
from konic.finetuning.rewards.composer import KonicLLMRewardComposer
from konic.finetuning.rewards.listing import list_rewards
from konic.finetuning.rewards.moments import RunningMoments
from konic.finetuning.rewards.scoring import Scorer
from konic.finetuning.rewards.totals import evaluation_moments
from konic.finetuning.rollout.evaluation import evaluate
from konic.finetuning.rollout.sampler import Sampler
from konic.finetuning.rollout.serving import serving
from konic.finetuning.run.checkpoint import checkpoints, load_checkpoint, read_record
from konic.finetuning.run.environment import environment
from konic.finetuning.run.folder import RunFolder
from konic.finetuning.run.place import RunPlace
from konic.finetuning.run.preflight import check_settings
from konic.finetuning.run.processes import require_equal_processes
from konic.finetuning.run.remote import fetched
from konic.finetuning.run.resume import describe_changes, plan_to_follow, require_same_run, same_best
from konic.finetuning.run.reward_weights import RewardWeights
from konic.finetuning.run.saving import NoSaver, Saver, write_card
from konic.finetuning.run.served import ServedCheck
from konic.finetuning.run.state import TrainerState
from konic.finetuning.system.places import is_url
from konic.finetuning.system.signals import uninterrupted
from konic.finetuning.system.world import find_world, from_first
from konic.output import get_logger

logger = get_logger(__name__)

INTERRUPTED = "interrupted"


class Session:
    """The parts and the state of a run. It lives as long as its engine: a second training continues the first."""

    def __init__(self, agent: KonicFinetuningAgent) -> None:
        self.agent = agent
        self.world = find_world(agent.get_training_config().process_timeout_seconds)
        self.scorer = Scorer(agent.get_reward_composer(), agent.get_training_config(), self.world)
        self.state = TrainerState()
        self.reward_weights = RewardWeights(agent.get_reward_composer())
        self.weights_are_whole = True
        """False where an error left the weights between two iterations."""
        self.device = "auto"
        self.place = RunPlace(agent.get_base_model(), self.world)
        self.job_file: Path | None = None
        self.driver: Mapping[str, Any] | None = None
        self.served_check: ServedCheck | None = None
        """Checks what a server samples; None where konic samples by itself."""
        self._served_sampler: Sampler | None = None
        self._learner: Learner | None = None
        self._prompts: PromptSet | None = None
        self._prompts_sha256: str | None = None
        self._adopted: str | None = None
        self._has_evaluated = False
        self._warned_of_untrained = self._warned_of_value_warmup = False
        self._reported_changes = ""
        self._checked_device: str | None = None

    @property
    def training(self) -> TrainingConfig:
        """How to learn."""
        return self.agent.get_training_config()

    @property
    def generation(self) -> GenerationConfig:
        """How to sample."""
        return self.agent.get_generation_config()

    @property
    def selection(self) -> Selection:
        """How the best iteration is chosen."""
        return Selection(
            on_held_out=self.training.eval_every is not None,
            kl_budget=self.training.kl_budget,
            kl_price=self.agent.kl_penalty_weight,
            kl_free=self.training.kl_target or 0.0,
        )

    @property
    def learner(self) -> Learner:
        """The model on its device, with its optimizer; loaded at first use.

        Raises:
            KonicError: It cannot be loaded, or the device was changed after it was.
        """
        device = self.world.device(pick_device(self.device))
        if self._learner is None:
            self._learner = build_learner(self.agent, device, self.world)
            self._learner.policy.decode_plan = self._fastest_plan(self._learner.policy)
        elif self._learner.policy.device.type != device.type:
            raise ConfigError(f"device={self.device!r}: the model is already on {self._learner.policy.device}.")
        return self._learner

    @property
    def sampler(self) -> Sampler:
        """Samples the responses of a training."""
        return self._served_sampler or self.learner.sampler

    @property
    def prompts(self) -> PromptSet:
        """The prompts to learn on, and those held out; loaded at first use."""
        if self._prompts is None:
            self._prompts = load_prompts(self.agent.get_dataset_config())
            self._prompts_sha256 = self._prompts.fingerprint()
        return self._prompts

    @property
    def folder(self) -> RunFolder:
        """The folder of the run. It exists only after :meth:`opened`."""
        return self.place.folder

    def settings(self, last_iteration: int) -> dict[str, Any]:
        """Every setting of the run by name, as plain values, for `on_train_begin` and `run.json`."""
        more = {
            "max_iterations": last_iteration,
            "iterations_done": self.state.iteration,
            "selection": asdict(self.selection),
            "prompts_sha256": self._prompts_sha256,
            "base_sha256": self.learner.base_sha256,
            "tokenizer_sha256": self.learner.tokenizer_sha256,
            "decode_plan": asdict(self.learner.policy.decode_plan),
            "precision": self.learner.policy.precision,
            "reward_weights": self.reward_weights.first,
        }
        if self.learner.policy.resumes_adapter:  # one of the agent is ignored
            more["lora_config"] = own_settings(self.learner.policy.adapter_config())
        return self.agent.settings(uses_lora=self.learner.policy.uses_lora) | more

    def result(self, model_path: str | None = None, stopped_because: str | None = None) -> FinetuningResult:
        """The result of the iterations done so far."""
        return FinetuningResult(
            model_name=self.agent.get_base_model(),
            history=list(self.state.history),
            total_time_sec=self.state.elapsed_seconds,
            model_path=model_path,
            stopped_because=stopped_because,
            selection=self.selection,
        )

    def evaluate(
        self,
        prompts: Sequence[Prompt],
        moments: Mapping[str, RunningMoments],
        untrained: bool,
        warns_of_cuts: bool = True,
    ) -> Evaluation:
        """Responses of the policy to prompts, and their rewards. An untrained policy is evaluated as its reference."""
        learner = self.learner
        return evaluate(
            learner.policy,
            learner.reference_sampler if untrained else learner.sampler,
            self.scorer,
            prompts,
            self.generation,
            learner.special_tokens,
            self.training.seed,
            moments,
            samples_reference=untrained,
            world=self.world,
            warns_of_cuts=warns_of_cuts,
        )

    def evaluate_held_out(self, iterations_done: int) -> Evaluation:
        """Responses to the held-out prompts, written to the folder. Normalised rewards use the scale of the first time.

        After 0 iterations the policy is its reference, so this can be evaluated at any time.
        """
        first = (self._recorded_evaluation(0) or self.evaluate_held_out(0)) if iterations_done else None
        moments = evaluation_moments(list_rewards(self.agent.get_reward_composer()), first)
        is_first, self._has_evaluated = not self._has_evaluated, True
        evaluation = self.evaluate(self.prompts.held_out, moments, iterations_done == 0, warns_of_cuts=is_first)
        self.folder.write_evaluation(iterations_done, evaluation)
        return evaluation

    def note_what_is_kept(self, error: BaseException) -> None:
        """Add to the error that ends a run where its checkpoint is, and how to go on from there."""
        kept = checkpoints(self.folder.path) if self.world.rank == 0 and isinstance(error, Exception) else []
        if not kept:
            return
        run = self.folder.address(self.folder.path)
        lines = [
            f"{kept[-1].name} is kept in {run}. With checkpoint_dir={run!r}, resume_from_checkpoint=True goes on from "
            "there."
        ]
        if isinstance(error, RewardError):
            lines.append(
                "If you change a reward, add allow_changes=True: from then on it is another run. "
                "TrainingConfig(on_reward_error='skip') leaves out the responses on which a reward fails."
            )
        error.add_note(" ".join(lines))

    def require_whole_weights(self) -> None:
        """Raise TrainingError if an error has left the weights between two iterations."""
        if not self.weights_are_whole:
            raise TrainingError(
                "An error in an update left the weights of this engine between two iterations. Create a new engine; if "
                "there is a checkpoint, resume with train(resume_from_checkpoint=...)."
            )

    def adopt(self, checkpoint: str | None) -> None:
        """Take over, once, the weights and the state of a checkpoint that workers of this run wrote.

        Raises:
            OutputError: It is not on this machine.
        """
        if checkpoint is None or checkpoint == self._adopted:
            return
        path = Path(fetched(checkpoint, self.place.checkpoint_dir))
        if not path.is_dir():
            raise OutputError(
                f"{checkpoint}: the workers wrote it where this machine does not see it. Name a checkpoint_dir on "
                "storage that all share, or use the model there."
            )
        self.state = load_checkpoint(path, self.learner.policy, self.learner.optimizer)
        self._adopted = checkpoint

    def check(self) -> None:
        """Check everything that can be checked before the model is loaded.

        Raises:
            KonicError: The run cannot start.
        """
        pick_device(self.device)
        if self.device != self._checked_device:  # once: it also warns
            check_settings(self.agent, self.world.size, self.device)
            self._checked_device = self.device
        names = collect_columns(self.prompts.rows[:1])[0]
        KonicLLMRewardComposer.check_columns(self.agent.get_reward_composer(), names)

    def warn_of_changes(self, agent: Any) -> None:
        """Warn, once for each change, of settings that were changed after the session was made of the agent."""
        agent = read_agent(agent)
        settings = (made_of.settings(made_of.get_lora_config() is not None) for made_of in (self.agent, agent))
        changes = describe_changes(*settings)
        if changes and changes != self._reported_changes:
            logger.warning(
                "The engine has started and keeps its settings, but some were changed since: %s. For other values make "
                "a new engine; to go on from here, train(..., resume_from_checkpoint=True, allow_changes=True).",
                changes,
            )  # fmt: skip
        self._reported_changes = changes

    def warn_if_untrained(self) -> None:
        """Warn, once, if the model is still the untrained one and the folder holds checkpoints of a training."""
        named = self.place.checkpoint_dir
        if self._warned_of_untrained or self.state.iteration or named is None or is_url(named) or self.world.rank > 0:
            return
        folder, base = Path(named).expanduser().resolve(), Path(self.agent.get_base_model()).expanduser().resolve()
        if not base.is_relative_to(folder) and checkpoints(folder):
            self._warned_of_untrained = True
            logger.warning(
                "%s holds checkpoints that this engine has not loaded: its model is the untrained one. To load the "
                "newest, call train(N, resume_from_checkpoint=True), or name the folder of a model there, such as "
                "final, as base_model.",
                named,
            )  # fmt: skip

    @contextlib.contextmanager
    def opened(
        self, max_iterations: int, resume: bool | str | os.PathLike[str] | None, allow_changes: bool
    ) -> Iterator[int]:
        """Within it the folder is locked, holds nothing after the resumed iteration, and the model is loaded.

        Yields the number of the last iteration to run.
        """
        with self.place.opened(resume, self.state.history) as checkpoint:
            if checkpoint is not None:
                self._load(checkpoint, max_iterations, allow_changes)
            last = max_iterations if resume else self.state.iteration + max_iterations
            if self.state.iteration >= last:
                logger.warning(
                    "Nothing is left to train: %d iterations are done, and max_iterations=%d is their total.",
                    self.state.iteration, max_iterations,
                )  # fmt: skip
            else:
                self._plan(last)
                self._warn_of_value_warmup(last)
            policy = self.learner.policy
            policy.decode_plan = DecodePlan(**from_first(self.world, asdict(policy.decode_plan)))
            require_equal_processes(self.world, self.settings(last), self.learner.policy.trainable())
            device, composer = self.learner.policy.device, self.agent.get_reward_composer()
            self.folder.write_run(self.settings(last), environment(device), composer, self.job_file, self.driver)
            with self._served(last), self.reward_weights.training():
                yield last

    def _plan(self, last: int) -> None:
        """Plan the learning rate, and say so where it is not what a training before this one planned."""
        done, planned = self.state.iteration, self.state.planned_iterations
        self.state.plan(last)
        if self.training.lr_scheduler not in ENDS_AT_ZERO or done == 0 or last == planned:
            return
        if done >= planned:
            logger.warning(
                "The learning rate begins a new fall, over iterations %d to %d: the planned ones are done. "
                "lr_scheduler='inverse_sqrt' falls with the steps done instead, 'constant' not at all; where a run is "
                "resumed, add allow_changes=True.",
                done + 1, last,
            )  # fmt: skip
        else:
            logger.warning(
                "The learning rate falls until iteration %d; the training before planned it until iteration %d.",
                last, planned,
            )  # fmt: skip

    def _warn_of_value_warmup(self, last: int) -> None:
        """Say so where no iteration of this training moves the policy."""
        if self.training.value_warmup_iterations >= last and not self._warned_of_value_warmup:
            self._warned_of_value_warmup = True
            logger.warning(
                "value_warmup_iterations=%d: this training ends at iteration %d, so only the value head learns and the "
                "policy stays as it is. Set it lower, or train for longer.",
                self.training.value_warmup_iterations, last,
            )  # fmt: skip

    @contextlib.contextmanager
    def _served(self, last_iteration: int) -> Iterator[None]:
        """Within it, a server samples if the settings say so and there is something to sample."""
        if self.generation.engine == "local" or self.state.iteration >= last_iteration:
            yield
            return
        learner = self.learner
        with serving(
            self.generation, learner.policy, learner.special_tokens, learner.location, learner.revision
        ) as sampler:
            is_own = self.generation.vllm_address is None
            self._served_sampler, self.served_check = sampler, ServedCheck(learner.policy, sampler, is_own)
            try:
                yield
            finally:
                self._served_sampler = self.served_check = None

    def saver(
        self, callbacks: Callbacks, last_iteration: int, save_every: int | None, save_total_limit: int | None
    ) -> Saver:
        """What writes the checkpoints and models of this run."""
        kind = Saver if self.world.rank == 0 else NoSaver
        return kind(
            folder=self.folder,
            learner=self.learner,
            state=self.state,
            callbacks=callbacks,
            settings=lambda: self.settings(last_iteration),
            save_every=save_every,
            save_total_limit=save_total_limit,
            world=self.world,
            saved_iteration=self.state.iteration or None,
        )

    def finish(self, saver: Saver, last_iteration: int, stopped: str | None) -> FinetuningResult:
        """Write the last checkpoint, the final and the best model; then evaluate the held-out prompts once more."""
        final = self.folder.path / "final"
        result, is_saved = self.result(self.folder.address(final), stopped), False
        with contextlib.suppress(KeyboardInterrupt), uninterrupted():
            saver.final(result)
            is_saved = True
        if not is_saved:
            newest = next(reversed(checkpoints(self.folder.path)), None)
            kept = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint"
            logger.warning("A second Ctrl-C stopped the saving: final/ was not written; %s.", kept)
            return replace(result, model_path=None)
        if self.prompts.held_out and stopped != INTERRUPTED:
            with contextlib.suppress(KeyboardInterrupt), self.world.propagating_errors():
                before, after = self._before_and_after()
                result = replace(result, before=before, after=after)
                if self.world.rank == 0:
                    write_card(self.learner, final, result, self.settings(last_iteration))
        elif self.prompts.held_out and self.world.rank == 0:
            logger.warning("The held-out prompts were not evaluated. Resuming the run does it when that ends.")
        self.folder.publish(is_last=True)
        return result

    def _before_and_after(self) -> tuple[Evaluation, Evaluation]:
        """The evaluations on the held-out prompts before the first iteration and now."""
        before = self._recorded_evaluation(0) or self.evaluate_held_out(0)
        after = self.evaluate_held_out(self.state.iteration)
        if before.prompts != after.prompts:  # it is from other data
            before = self.evaluate_held_out(0)
            after = self.evaluate_held_out(self.state.iteration)
        return before, after

    def _recorded_evaluation(self, iterations_done: int) -> Evaluation | None:
        """An evaluation that the first process reads from the folder; None if there is none."""
        found = self.folder.read_evaluation(iterations_done)
        values = from_first(self.world, found and asdict(found))
        return Evaluation(**values) if values else None

    def _load(self, checkpoint: Path, max_iterations: int, allow_changes: bool) -> None:
        """Restore the state of a checkpoint, and remove from the folder what was written after it."""
        record, learner = read_record(checkpoint), self.learner
        weights = record.settings.get("reward_weights"), record.state.reward_weights
        keeps_weights = self.reward_weights.can_continue(*weights)
        if not keeps_weights:
            self.reward_weights.restart()
        settings = self.settings(max_iterations) | ({"reward_weights": weights[0]} if keeps_weights else {})
        is_comparable = require_same_run(checkpoint, record, settings, learner.policy.device, allow_changes)
        self.state = load_checkpoint(checkpoint, learner.policy, learner.optimizer)
        if keeps_weights:
            self.reward_weights.resume(*weights)
        if self.state.best_weights is not None and not same_best(record, self.selection, self.state.history):
            self.state.best_weights = None
            logger.warning(
                "By the new settings another iteration is the best so far, whose weights are not kept: best/ stays as "
                "the earlier settings chose it, until an iteration is better by the new ones."
            )
        if self.generation.decode_layout in (None, "auto"):
            current = learner.policy.decode_plan
            dtype = learner.policy.language_model.causal_lm.dtype
            learner.policy.decode_plan = plan_to_follow(record, current, dtype) or current
        earlier = self.folder.go_back_to(self.state.history)
        if earlier is not None:
            logger.warning("What had been written after iteration %d is now in %s.", self.state.iteration, earlier)
        aside = None if is_comparable else self.folder.set_evaluations_aside()
        if aside is not None:
            logger.warning("The held-out prompts are evaluated anew: the evaluations so far are now in %s.", aside)
        if self.prompts.stream is not None:
            start, num_rows = time.monotonic(), self.state.num_prompts
            self.prompts.batch(num_rows, 0)
            logger.warning("Read the first %d rows of the stream again: %.1f s.", num_rows, time.monotonic() - start)

    def _fastest_plan(self, policy: Policy) -> DecodePlan:
        """The plan that samples fastest on this machine, by measurement, for this process's share of a batch.

        Divided weights are not measured: no process holds a layer.
        """
        num_rows, generation = len(self.world.own_rows(self.training.batch_size)), self.generation
        is_measured = generation.decode_layout == "auto"
        if policy.sharding is not NOT_SHARDED and is_measured:
            return DecodePlan()
        with policy.merged_adapter() if is_measured else contextlib.nullcontext(policy.language_model) as model:
            return choose_plan(model.causal_lm, max(1, num_rows), generation.max_new_tokens, generation.decode_layout)
