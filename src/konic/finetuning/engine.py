"""The engine: trains the model of an agent, evaluates it, samples from it and saves it."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Self

from konic.finetuning.agent import KonicFinetuningAgent
from konic.finetuning.callbacks.composite import Callbacks
from konic.finetuning.callbacks.hooks import BaseKonicFinetuningCallback
from konic.finetuning.data.prompts import Prompt, make_prompts
from konic.finetuning.errors import ConfigError, OutputError, did_you_mean
from konic.finetuning.models.loading import check_model_kwargs, pick_device
from konic.finetuning.results.summary import FinetuningResult
from konic.finetuning.rollout.evaluation import respond
from konic.finetuning.run.saving import write_model
from konic.finetuning.run.session import INTERRUPTED, Session
from konic.finetuning.system.files import as_path, filling_folder
from konic.finetuning.system.signals import stopping_on_signals, uninterrupted
from konic.finetuning.trainer import Trainer
from konic.output import tolerant_streams


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
        self._session = Session(agent)
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
        """Run iterations of sampling, scoring and updating. A second call continues from where the first ended.

        A checkpoint is also written at the end, after Ctrl-C, and after SIGTERM, which then ends the process.

        Args:
            max_iterations: Iterations to run; with `resume_from_checkpoint`, the total. 0 does nothing.
            save_every: Iterations between checkpoints; None writes one whenever ten minutes have passed, 0 only at the
                end.
            resume_from_checkpoint: True for the newest whole checkpoint in `checkpoint_dir`, or a checkpoint's folder.
            save_total_limit: How many of the newest checkpoints to keep; None keeps all.
            allow_changes: Resume although settings differ from the checkpoint's, which makes it another run.

        Raises:
            KonicError: Something the user can fix. Every whole iteration before it is kept.
        """
        session, callbacks = self._current_session(), Callbacks(self.callback)
        with stopping_on_signals() as stop, tolerant_streams(), session.scorer:
            _check_counts(max_iterations=max_iterations, save_every=save_every, save_total_limit=save_total_limit)
            session.check()
            if max_iterations == 0:
                return session.result()
            with session.opened(max_iterations, resume_from_checkpoint, allow_changes) as last_iteration:
                saver = session.saver(callbacks, last_iteration, save_every, save_total_limit)
                with callbacks.reporting_errors():
                    callbacks.on_train_begin(session.settings(last_iteration))
                    for result in session.state.history if resume_from_checkpoint else ():
                        callbacks.should_stop_early(result)
                    try:
                        stopped = Trainer(session, callbacks, saver, last_iteration).run(stop)
                    except BaseException as error:
                        if not isinstance(error, KeyboardInterrupt) or not session.weights_are_whole:
                            with uninterrupted():
                                saver.after_error(session.result(), session.weights_are_whole)
                            raise
                        stopped = INTERRUPTED
                    final = session.finish(saver, last_iteration, stopped)
                    callbacks.on_train_end(final)
                    return final

    def evaluate(self, prompts: Sequence[Any] | None = None) -> dict[str, Any]:
        """Responses to prompts and their rewards, with the same random numbers every time.

        Args:
            prompts: Strings, lists of chat messages, or dicts with columns; None takes the dataset's held-out prompts.

        Returns:
            prompts, responses, rewards and reward_mean; reward_breakdown (a list per reward, before weights) and
            reward_breakdown_mean; and per response kl_per_response (nats) and response_lengths (tokens).
        """
        session = self._current_session()
        chosen = session.prompts.held_out if prompts is None else self._make_prompts(prompts, "evaluate(prompts)")
        if not chosen:
            raise ConfigError("evaluate() has no prompts: give some, or set DatasetConfig(held_out=...).")
        with session.scorer:
            untrained = session.state.num_steps == 0
            return session.evaluate(chosen, session.state.reward_moments, untrained).to_dict()

    def generate(self, prompts: Sequence[Any]) -> list[str]:
        """A response to every prompt, with the same random numbers every time."""
        session, made = self._current_session(), self._make_prompts(prompts, "generate(prompts)")
        learner, generation, seed = session.learner, session.generation, session.training.seed
        return [
            sample.response
            for sample in respond(learner.policy, learner.sampler, made, generation, learner.special_tokens, seed)
        ]

    def save_pretrained(self, path: str | os.PathLike[str], merge: bool = False) -> None:
        """Write the model, tokenizer and a model card into a folder that PEFT and `transformers` load.

        Args:
            path: The folder; files of the same names in it are replaced.
            merge: True writes a full model with the adapter merged in, False the adapter (or the full model).
        """
        session, folder = self._current_session(), as_path(path, "save_pretrained(path)", OutputError)
        with filling_folder(folder) as target:
            settings = session.settings(session.state.iteration)
            write_model(session.learner, target, session.result(), settings, merge)

    def _current_session(self) -> Session:
        """The session, with the attributes of the engine as they are set now."""
        self._session.device, self._session.checkpoint_dir = self.device, self.checkpoint_dir
        return self._session

    def _make_prompts(self, prompts: Sequence[Any], where: str) -> list[Prompt]:
        if isinstance(prompts, str | Mapping) or not isinstance(prompts, Sequence):
            raise ConfigError(f"{where} takes a list of prompts, got {type(prompts).__name__}.")
        return make_prompts(list(prompts), self.agent.get_dataset_config(), where)


def _check_counts(max_iterations: Any, **others: Any) -> None:
    for name, value in {"max_iterations": max_iterations, **others}.items():
        least = 1 if name == "save_total_limit" else 0
        is_count = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if not is_count and (value is not None or name == "max_iterations"):
            raise ConfigError(f"train({name}={value!r}): it must be a whole number of at least {least}.")
