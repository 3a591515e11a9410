"""The engine: trains the model of an agent, evaluates it, samples from it and saves it."""

import copy
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from konic.finetuning.agent import KonicFinetuningAgent, read_agent, with_own_configs
from konic.finetuning.algorithms import KonicFinetuningMethodType, algorithm_of_method
from konic.finetuning.arguments import check_counts, refuse_unknown, require_flags, with_known_arguments
from konic.finetuning.callbacks.composite import Callbacks
from konic.finetuning.callbacks.console import KonicFinetuningCallback
from konic.finetuning.callbacks.hooks import BaseKonicFinetuningCallback
from konic.finetuning.data.prompts import Prompt, make_prompts
from konic.finetuning.data.rows import rows_of
from konic.finetuning.errors import ConfigError, OutputError, did_you_mean, no_attribute
from konic.finetuning.models.loading import pick_device
from konic.finetuning.models.model_kwargs import check_model_kwargs
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult
from konic.finetuning.rewards.composer import KonicLLMRewardComposer
from konic.finetuning.rollout.evaluation import respond
from konic.finetuning.run.remote import mirror_of
from konic.finetuning.run.saving import Saver, require_no_other_kind, write_model
from konic.finetuning.run.session import INTERRUPTED, Session
from konic.finetuning.settings import place_of
from konic.finetuning.successors import name_not_found
from konic.finetuning.system.files import as_path, filling_folder
from konic.finetuning.system.places import is_url
from konic.finetuning.system.signals import raising_on_signals, stopping_on_signals, uninterrupted
from konic.finetuning.system.user_code import standard_torch_modes
from konic.finetuning.system.world import is_one_of_several
from konic.finetuning.trainer import Trainer
from konic.output import get_logger, tolerant_streams

if TYPE_CHECKING:
    from konic.finetuning.cluster.driver import RayTraining

logger = get_logger(__name__)

__all__ = ["FinetuningIterationResult", "FinetuningResult", "KonicFinetuningEngine"]

_SUCCESSORS = {
    "backend": "There is one engine; TrainingConfig(algorithm=...) chooses how it learns.",
    "module": "save_pretrained(path) writes the model, for PEFT and transformers.",
    "dataset_loader": "dataset_config says where prompts come from.",
    "optimizer": "TrainingConfig has the settings of the optimizer.",
    "train_iter": "train(1) runs one more iteration.",
}


_PART_OF_AGENT = {
    "model_name": "base_model",
    "reward_composer": "reward_composer",
    "dataset_config": "dataset_config",
    "lora_config": "lora_config",
    "training_config": "training_config",
    "generation_config": "generation_config",
    "method": "finetuning_method",
}
"""The parts by which an engine is made, and the getter of each."""


_ATTRIBUTES = ("agent", "checkpoint_dir", "device", "callback")
"""What an engine has besides, and reads whenever it trains."""


def __getattr__(name: str) -> Any:
    raise name_not_found(__name__, name)


def _of_agent(part: str) -> Any:
    """Return the engine's attribute for a part of its agent: read at any time, and set until the engine starts."""

    def read(engine: "KonicFinetuningEngine") -> Any:
        return getattr(engine.agent, f"get_{part}")()

    def write(engine: "KonicFinetuningEngine", value: Any) -> None:
        engine._change_agent(part, **{part: value})

    return property(read, write)


_EVALUATES = "set DatasetConfig(held_out=...) and TrainingConfig(eval_every=...)"
_INSTEAD_IN_A_CALLBACK = {
    "evaluate": _EVALUATES, "generate": _EVALUATES, "save_pretrained": "take the checkpoint of train(save_every=...)",
}  # fmt: skip


class KonicFinetuningEngine:
    """Trains an agent's model by reinforcement learning, and samples, evaluates and saves it.

    It takes an agent, `KonicFinetuningEngine.from_agent(agent, **options)`, or the parts of one. It copies the settings
    when it first trains, evaluates or generates; what is assigned to a config later does not change its run.

    Args:
        model_name: The agent's `base_model`.
        reward_composer: See KonicFinetuningAgent, as for the configs.
        dataset_config: Where prompts come from.
        lora_config: The adapter; None trains every weight.
        training_config: How to train.
        generation_config: How to sample responses.
        callback: One callback or a list; see BaseKonicFinetuningCallback.
        checkpoint_dir: The run's folder, or its URL, such as `s3://bucket/run`; None makes a new one under `runs/`.
        device: "auto" or None (CUDA if there is one, else the CPU), or a torch device such as "cpu" or "cuda:0".
        method: A KonicFinetuningMethodType of konic 0.1; here `training_config` has the `algorithm`.
    """

    model_name = _of_agent("base_model")
    reward_composer = _of_agent("reward_composer")
    dataset_config = _of_agent("dataset_config")
    lora_config = _of_agent("lora_config")
    training_config = _of_agent("training_config")
    generation_config = _of_agent("generation_config")
    _is_divided = False
    _ray: "RayTraining | None" = None
    scaling: Any = None
    """A ray.train.ScalingConfig: Ray starts the processes that train; None trains in this one."""
    job_file: Path | None = None
    """The script or YAML file that the agent is from, for `run.json`; set by `konic train`."""
    driver: Mapping[str, Any] | None = None
    """Process id and host of the process that has started this one, if another one has; for `run.json`."""

    def __init__(
        self,
        model_name: str | os.PathLike[str] | None = None,
        reward_composer: KonicLLMRewardComposer | None = None,
        dataset_config: Any = None,
        lora_config: Any = None,
        training_config: Any = None,
        generation_config: Any = None,
        callback: BaseKonicFinetuningCallback | Sequence[BaseKonicFinetuningCallback] | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        device: str | None = None,
        method: str | None = None,
        **unknown: Any,
    ) -> None:
        known = (*_PART_OF_AGENT, "callback", "checkpoint_dir", "device")
        if "model_kwargs" in unknown:
            raise ConfigError("model_kwargs is an argument of KonicFinetuningAgent: use from_agent(agent).")
        refuse_unknown(unknown, "KonicFinetuningEngine", known)
        if hasattr(model_name, "get_base_model"):
            raise ConfigError("KonicFinetuningEngine takes a model's name; for an agent, use from_agent(agent).")
        for name, value in {"model_name": model_name, "reward_composer": reward_composer}.items():
            if value is None:
                raise ConfigError(f"KonicFinetuningEngine needs a {name}, or an agent: from_agent(agent).")
        configs = {"training_config": training_config, "generation_config": generation_config}
        agent = KonicFinetuningAgent(model_name, reward_composer, lora_config, dataset_config, **configs, method=method)
        self._prepare(agent, callback=callback, checkpoint_dir=checkpoint_dir, device=device)

    @classmethod
    def from_agent(cls, agent: Any, **options: Any) -> Self:
        """An engine for an agent, or any object with its getters; options: checkpoint_dir, device, callback, scaling.

        `scaling`, a ray.train.ScalingConfig, lets Ray start the processes that train (docs/cluster.md).

        A subclass with an `__init__` of its own is called with the agent's parts, by their names in this class.
        """
        known = ("checkpoint_dir", "device", "callback", "scaling")
        refuse_unknown(options, "from_agent", known)
        agent = read_agent(agent)
        if cls.__init__ is not KonicFinetuningEngine.__init__:
            engine = _construct(cls, agent)
            options = {name: getattr(engine, name) if options.get(name) is None else options[name] for name in known}
            agent = read_agent(engine.agent, model_kwargs=agent.get_model_kwargs())
        else:
            engine = cls.__new__(cls)
        engine._prepare(agent, **options)
        return engine

    def _prepare(
        self,
        agent: KonicFinetuningAgent,
        *,
        callback: Any = None,
        checkpoint_dir: Any = None,
        device: Any = None,
        scaling: Any = None,
    ) -> None:
        self.agent = agent
        self.checkpoint_dir = checkpoint_dir
        self.device = "auto" if device is None else device
        self.callback = KonicFinetuningCallback() if callback is None else callback
        check_model_kwargs(agent.get_model_kwargs())
        self.scaling, self._ray = scaling, None
        if scaling is None:
            if not is_one_of_several():  # of several, an error of one must reach the others: `train` checks it
                pick_device(self.device)
            if agent.get_training_config().reward_resources is not None:
                raise ConfigError(
                    "TrainingConfig: reward_resources places reward workers in a Ray cluster, and this training is not "
                    "on Ray: give scaling=ScalingConfig(...) or --num-workers, or leave it out."
                )
        else:
            from konic.finetuning.cluster.connection import check_scaling
            from konic.finetuning.cluster.driver import RayTraining

            self._ray = RayTraining(scaling)
            check_scaling(scaling, self.device, agent.get_training_config().batch_size)
        if is_url(checkpoint_dir):
            mirror_of(str(checkpoint_dir)).check()
        elif checkpoint_dir is not None:
            as_path(checkpoint_dir, "checkpoint_dir", OutputError)

    @cached_property
    def _session(self) -> Session:
        return Session(with_own_configs(self.agent))

    @property
    def has_started(self) -> bool:
        """True once the engine has trained, evaluated or generated: it then keeps its settings."""
        return "_session" in vars(self)

    @property
    def method(self) -> KonicFinetuningMethodType | None:
        """The algorithm as konic 0.1 named it; None where it had no such algorithm."""
        return self.agent.get_finetuning_method()

    @method.setter
    def method(self, value: str) -> None:
        training = self.training_config.with_fields({"algorithm": algorithm_of_method(value)})
        self._change_agent("method", training_config=training, method=value)

    def _change_agent(self, part: str, **changes: Any) -> None:
        if self.has_started:
            raise ConfigError(f"The engine has started and keeps its {part}. Make a new engine for another one.")
        self.agent = read_agent(self.agent, **changes)

    @property
    def backend_name(self) -> str:
        """The algorithm, for scripts of konic 0.1, which print it."""
        return f"konic {self.agent.get_training_config().algorithm}"

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(self, name, _SUCCESSORS)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and not hasattr(type(self), name) and name not in _ATTRIBUTES:
            hint = did_you_mean(name, [*_ATTRIBUTES, *_PART_OF_AGENT])
            if type(self) is KonicFinetuningEngine:  # a subclass may have names of its own
                hint = hint or place_of(name)
            if hint:
                logger.warning("The engine has no attribute %r, so nothing reads it.%s", name, hint)
        super().__setattr__(name, value)

    def setup(self) -> None:
        """Load the prompts and the model now, rather than when they are first needed."""
        session = self._current_session()
        session.check()
        _ = session.learner

    @with_known_arguments
    @standard_torch_modes()
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
            KonicError: Something the user can fix. Every whole iteration before it is kept; if every weight is
                trained and an update had begun, those up to the last checkpoint.
        """
        if self.scaling is not (None if self._ray is None else self._ray.scaling):
            raise ConfigError("scaling is chosen when an engine is made: from_agent(agent, scaling=...).")
        if self._ray is not None:
            return self._train_on_ray(
                self._ray,
                max_iterations=max_iterations,
                save_every=save_every,
                resume_from_checkpoint=resume_from_checkpoint,
                save_total_limit=save_total_limit,
                allow_changes=allow_changes,
            )
        session = self._current_session()
        callbacks = Callbacks(self.callback if session.world.rank == 0 else KonicFinetuningCallback(verbose=False))
        if session.world.size > 1 and self.driver is None:  # else the driver has the user's callbacks, and says it
            callbacks.patience_seconds = self.training_config.process_timeout_seconds
        with stopping_on_signals(), tolerant_streams(), session.world.propagating_errors(), session.scorer:
            check_counts(max_iterations=max_iterations, save_every=save_every, save_total_limit=save_total_limit)
            require_flags("train", allow_changes=allow_changes)
            session.check()
            if max_iterations == 0:
                return session.result()
            with (
                session.opened(max_iterations, resume_from_checkpoint, allow_changes) as last_iteration,
                callbacks.reporting_errors(),
            ):
                saver = session.saver(callbacks, last_iteration, save_every, save_total_limit)
                more = {"backend": self.backend_name, "run_folder": str(session.folder.path)}
                callbacks.on_train_begin(session.settings(last_iteration) | more)
                for result in session.state.history if resume_from_checkpoint else ():
                    callbacks.should_stop_early(result)
                stopped = self._iterate(session, callbacks, saver, last_iteration)
                final = session.finish(saver, last_iteration, stopped)
                session.world.gather({})  # no process is done before all files are written
                callbacks.on_train_end(final)
                return final

    def _iterate(self, session: Session, callbacks: Callbacks, saver: Saver, last_iteration: int) -> str | None:
        """Run the iterations; if an error ends them, save what is whole. Returns why they stopped early, or None."""
        try:
            with session.world.propagating_errors(), self._divided(session.world.size > 1):
                return Trainer(session, callbacks, saver, last_iteration).run()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt) and session.weights_are_whole:
                return INTERRUPTED
            with uninterrupted():
                saver.after_error(session.result(), session.weights_are_whole)
                session.note_what_is_kept(error)
            raise

    def _train_on_ray(self, ray: "RayTraining", **options: Any) -> FinetuningResult:
        """Train in workers. This engine takes over their newest checkpoint when its own model is needed."""
        check_counts(**{name: options[name] for name in ("max_iterations", "save_every", "save_total_limit")})
        require_flags("train", allow_changes=options["allow_changes"])
        self._session.warn_of_changes(self.agent)
        worker, callbacks = copy.copy(self), Callbacks(self.callback)
        for name in ("callback", "checkpoint_dir", "scaling", "_ray"):
            setattr(worker, name, None)
        worker.agent = vars(worker).pop("_session", self._session).agent
        if self.device == "auto":
            worker.device = "cuda" if self.scaling.use_gpu else "cpu"
        limit = callbacks.patience_seconds = self.training_config.process_timeout_seconds
        with stopping_on_signals(), tolerant_streams(), callbacks.reporting_errors(), self._divided(True):
            return ray.train(worker, callbacks, self.checkpoint_dir, options, limit)

    @with_known_arguments
    @standard_torch_modes()
    @raising_on_signals()
    def evaluate(self, prompts: Sequence[Any] | None = None) -> dict[str, Any]:
        """Responses to prompts and their rewards, with the same random numbers every time.

        Args:
            prompts: Strings, lists of chat messages, dicts with columns, or a table; None takes the held-out prompts.

        Returns:
            prompts, responses, rewards and reward_mean; reward_breakdown (a list per reward, before weights) and
            reward_breakdown_mean; and per response kl_per_response (nats) and response_lengths (tokens).
        """
        self._require_whole("evaluate")
        session = self._current_session()
        session.warn_if_untrained()
        chosen = session.prompts.held_out if prompts is None else self._make_prompts(prompts, "evaluate(prompts)")
        if not chosen:
            raise ConfigError("evaluate() has no prompts: give some, or set DatasetConfig(held_out=...).")
        with session.world.propagating_errors(), session.scorer:
            untrained = session.state.num_steps == 0
            return session.evaluate(chosen, session.state.reward_moments, untrained).to_dict()

    @with_known_arguments
    @standard_torch_modes()
    @raising_on_signals()
    def generate(self, prompts: Sequence[Any]) -> list[str]:
        """A response to every prompt, with the same random numbers every time."""
        self._require_whole("generate")
        session, made = self._current_session(), self._make_prompts(prompts, "generate(prompts)")
        session.warn_if_untrained()
        learner, generation, seed = session.learner, session.generation, session.training.seed
        return [
            sample.response
            for sample in respond(
                learner.policy, learner.sampler, made, generation, learner.special_tokens, seed, session.world
            )
        ]

    @with_known_arguments
    @standard_torch_modes()
    def save_pretrained(self, path: str | os.PathLike[str], merge: bool = False) -> None:
        """Write the model, tokenizer and a model card into a folder that PEFT and `transformers` load.

        Args:
            path: The folder; files of the same names in it are replaced.
            merge: True writes a full model with the adapter merged in, False the adapter (or the full model).

        Raises:
            OutputError: The folder cannot be written, or holds an adapter where a full model is to be saved, or the
                other way round: `transformers` would load both.
        """
        require_flags("save_pretrained", merge=merge)
        is_in_parts = self.training_config.sharding is not None and self.agent.get_lora_config() is None
        if self._ray is not None or is_in_parts:
            self._require_whole("save_pretrained")
        session, folder = self._current_session(), as_path(path, "save_pretrained(path)", OutputError)
        session.warn_if_untrained()
        require_no_other_kind(folder, is_adapter=session.learner.policy.uses_lora and not merge)
        settings = session.settings(session.state.iteration)
        if session.world.rank > 0:
            write_model(session.learner, None, session.result(), settings, merge)
            return
        with filling_folder(folder) as target:
            write_model(session.learner, target, session.result(), settings, merge)

    @contextmanager
    def _divided(self, is_divided: bool) -> Iterator[None]:
        """Within it, several processes train, if they do, and a callback in one of them cannot use the model."""
        self._is_divided = is_divided
        try:
            yield
        finally:
            self._is_divided = False

    def _require_whole(self, method: str) -> None:
        if self._is_divided:
            raise ConfigError(
                f"{method}() needs all processes of a training, and a callback runs in one of them: call it after "
                f"train(), or {_INSTEAD_IN_A_CALLBACK[method]}."
            )

    def _current_session(self) -> Session:
        """The session, with the attributes of the engine as they are set now."""
        self._session.require_whole_weights()
        self._session.warn_of_changes(self.agent)
        self._session.place.checkpoint_dir = self.checkpoint_dir
        self._session.device, self._session.job_file, self._session.driver = self.device, self.job_file, self.driver
        if self._ray is not None:
            self._session.adopt(self._ray.checkpoint)
        return self._session

    def _make_prompts(self, prompts: Sequence[Any], where: str) -> list[Prompt]:
        try:
            rows = rows_of(prompts)
        except ValueError as error:
            raise ConfigError(f"{where}: {error}.") from None
        return make_prompts(rows, self._session.agent.get_dataset_config(), where)


def _construct(kind: Any, agent: KonicFinetuningAgent) -> Any:
    """An engine of a class with an `__init__` of its own, called with the agent's parts as konic 0.1 did."""
    parts = {name: getattr(agent, f"get_{getter}")() for name, getter in _PART_OF_AGENT.items()}
    try:
        inspect.signature(kind).bind(**parts)
    except TypeError as error:
        raise ConfigError(
            f"{kind.__name__}.from_agent(agent) calls {kind.__name__}({', '.join(f'{name}=...' for name in parts)}), "
            f"but its __init__ does not fit: {error}. Give it **parts, and pass them on: super().__init__(**parts)."
        ) from None
    return kind(**parts)
