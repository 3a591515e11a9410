"""The user's choices for a run: model, rewards, prompts and settings, checked before anything is loaded."""

import copy
import inspect
import json
import os
from collections.abc import Mapping
from typing import Any, Self

from konic.finetuning.algorithms import KonicFinetuningMethodType, method_of_algorithm
from konic.finetuning.config import GenerationConfig, LoraConfig, TrainingConfig
from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.errors import ConfigError, did_you_mean, is_valid_text, no_attribute
from konic.finetuning.rewards.composer import KonicLLMRewardComposer
from konic.finetuning.settings import Settings, describe, texts_in
from konic.text import keep_secret, redact_all

_CONFIGS = ("training_config", "generation_config", "dataset_config", "lora_config")
_PARTS = ("base_model", "reward_composer", *_CONFIGS, "model_kwargs")
"""What an agent consists of; each has a getter of its name."""
_GETTERS = {name: f"get_{name}" for name in _PARTS} | {"method": "get_finetuning_method"}
"""The arguments of an agent, and the getter of each."""


_SUCCESSORS = {
    "environment": "Prompts come from dataset_config, rewards from reward_composer.",
    "module": "The model is named by base_model; what from_pretrained takes goes into model_kwargs.",
    "get_environment": "Prompts come from get_dataset_config(), rewards from get_reward_composer().",
    "get_environment_config": "Use get_generation_config().to_dict().",
    "get_algorithm_config": "Use get_training_config().to_dict().",
    "get_module": "The engine builds the model of get_base_model() and get_lora_config().",
}


_OTHER_NAMES = {
    "model_name": "base_model", "model": "base_model", "model_name_or_path": "base_model",
    "composer": "reward_composer", "rewards": "reward_composer", "reward": "reward_composer",
    "peft_config": "lora_config", "lora": "lora_config", "dataset": "dataset_config", "config": "training_config",
    "args": "training_config", "training_args": "training_config",
}  # fmt: skip
"""What the engine here, and trainers elsewhere, call an argument of the agent."""


class BaseKonicFinetuningAgent:
    """Base class of one's own agents. Any object with the getters of :class:`KonicFinetuningAgent` is an agent.

    get_base_model() and get_reward_composer() are needed; what another getter would return is the default without it.
    """


class KonicFinetuningAgent(BaseKonicFinetuningAgent):
    """What to train and how: a base model, a reward composer and configs. Each config may be a dict.

    Args:
        base_model: A Hub id, a folder, a `.gguf` file, or a packaged model such as "smollm2-135m". Hub id and folder
            may be those of a LoRA adapter, which training then continues.
        reward_composer: Scores the responses.
        lora_config: The adapter, as konic's or PEFT's LoraConfig; None trains every weight.
        dataset_config: Where prompts come from; None takes the bundled prompts.
        training_config: How to train.
        generation_config: How to sample responses.
        model_kwargs: Passed to `from_pretrained`: revision, token, dtype, attn_implementation, trust_remote_code,
            quantization_config.
        method: A KonicFinetuningMethodType of konic 0.1; here `training_config` has the `algorithm`.

    Raises:
        ConfigError: A value is invalid; the message names it.
        RewardError: The composer has no rewards.
    """

    _given: Mapping[str, Any] | None = None
    """The arguments as they were given; None until `__init__` has ended. A copy, which may have others, has none."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Set the defaults here, so that a subclass with getters of its own need not call `super().__init__()`."""
        self = super().__new__(cls)
        self.__dict__.update(_base_model=None, _reward_composer=None)  # refused where no getter replaces them
        self._lora_config = self._method = None
        self._dataset_config, self._training_config = DatasetConfig(), TrainingConfig()
        self._generation_config, self._model_kwargs = GenerationConfig(), {}
        return self

    def __init__(
        self,
        base_model: str | os.PathLike[str] | None = None,
        reward_composer: KonicLLMRewardComposer | None = None,
        lora_config: Any = None,
        dataset_config: DatasetConfig | Mapping[str, Any] | None = None,
        training_config: TrainingConfig | Mapping[str, Any] | None = None,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        method: str | None = None,
        **unknown: Any,
    ) -> None:
        _refuse_unknown(unknown)
        given = {
            "base_model": base_model, "reward_composer": reward_composer, "lora_config": lora_config,
            "dataset_config": dataset_config, "training_config": training_config,
            "generation_config": generation_config, "model_kwargs": model_kwargs, "method": method,
        }  # fmt: skip
        if isinstance(base_model, os.PathLike):
            base_model = os.fspath(base_model)
        if not isinstance(base_model, str) or not base_model.strip():
            raise ConfigError(f"base_model must name a model or a folder, got {_shown_model(base_model)}.")
        if not isinstance(reward_composer, KonicLLMRewardComposer):
            is_misplaced = isinstance(lora_config, KonicLLMRewardComposer)
            hint = " Name the arguments: the second one of konic 0.1, environment, is gone." if is_misplaced else ""
            if callable(reward_composer) and not isinstance(reward_composer, type):
                hint = " For a function f, write KonicLLMRewardComposer(reward_functions=[f])."
            raise ConfigError(
                f"reward_composer must be a KonicLLMRewardComposer, got {describe(reward_composer)}.{hint}"
            )
        KonicLLMRewardComposer.check(reward_composer)  # a script may have a method `check` of its own
        self._base_model = base_model
        self._reward_composer = reward_composer
        self._lora_config = _lora_config(lora_config)
        self._dataset_config = DatasetConfig.from_value(dataset_config)
        self._method = method
        self._training_config = TrainingConfig.from_value(training_config).with_method(method)
        self._generation_config = GenerationConfig.from_value(generation_config)
        if model_kwargs is not None and not isinstance(model_kwargs, Mapping):
            raise ConfigError(f"model_kwargs must be a dict, got {describe(model_kwargs)}.")
        for name, value in {"base_model": base_model, "model_kwargs": model_kwargs}.items():
            if not all(map(is_valid_text, texts_in(value))):
                raise ConfigError(f"{name} must be valid text, without half a character (a lone surrogate).")
        self._model_kwargs = dict(model_kwargs or {})
        keep_secret(self._model_kwargs.get("token"))
        self._check_together()
        self._given = given
        for name, value in self.__dict__.pop("_assigned", {}).items():
            if given[name] is None and not self._returns(name, value):
                raise ConfigError(f"{name} was assigned before super().__init__({name}=...): give it there.")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the arguments, of which some cannot be copied, such as a generator of prompts."""
        return vars(self) if self._given is None else {**vars(self), "_given": {}}

    def _returns(self, name: str, value: Any) -> bool:
        """Return True if an argument is what was given for it, or equals what its getter returns."""
        if self._given and value is self._given[name]:
            return True
        try:
            return bool(value == getattr(self, _GETTERS[name])())
        except Exception:  # values of any kind may be compared here
            return False

    def _check_together(self) -> None:
        """Raise ConfigError if a setting of one config does not go with those of another."""
        if self._training_config.eval_every and not self._dataset_config.held_out:
            raise ConfigError(
                f"TrainingConfig(eval_every={self._training_config.eval_every}) needs prompts to evaluate on: set "
                "DatasetConfig(held_out=...)."
            )
        dtype, training = self._model_kwargs.get("dtype"), self._training_config
        says_both = dtype is not None and "precision" in training.model_fields_set
        agree = training.precision != "auto" and str(dtype).removeprefix("torch.") == training.precision
        if says_both and not agree:
            raise ConfigError(
                f"TrainingConfig(precision={training.precision!r}) and model_kwargs={{'dtype': {str(dtype)!r}}} "
                "contradict each other: both say in which numbers the base model computes. Leave dtype out."
            )
        if self._dataset_config.prefer_undecided and self._training_config.responses_per_prompt < 2:
            raise ConfigError(
                "DatasetConfig(prefer_undecided=True) compares the responses to one prompt: set "
                "TrainingConfig(num_generations=4), or an algorithm that compares groups."
            )

    def get_base_model(self) -> str:
        """Return the base model, as the user gave it."""
        return self._base_model

    def get_reward_composer(self) -> KonicLLMRewardComposer:
        """Return the reward composer, which scores the responses."""
        return self._reward_composer

    def get_lora_config(self) -> Any:
        """Return konic's or PEFT's LoraConfig, or None for full finetuning."""
        return self._lora_config

    def get_dataset_config(self) -> DatasetConfig:
        """Return the dataset config: where prompts come from."""
        return self._dataset_config

    def get_training_config(self) -> TrainingConfig:
        """Return the training config: how to train."""
        return self._training_config

    def get_generation_config(self) -> GenerationConfig:
        """Return the generation config: how to sample responses."""
        return self._generation_config

    def get_finetuning_method(self) -> KonicFinetuningMethodType | None:
        """Return the algorithm as konic 0.1 named it; None where it had no such algorithm."""
        return method_of_algorithm(self._training_config.algorithm)

    training_config = property(get_training_config)
    generation_config = property(get_generation_config)

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(self, name, _SUCCESSORS)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuse another value for an argument: its getter would not return it. A getter of a subclass may.

        Before `super().__init__()` it is the value that the agent has without that call.
        """
        getter = _GETTERS.get(name)
        if getter is None:
            super().__setattr__(name, value)
            return
        is_own = getter in vars(self) or getattr(type(self), getter) is not getattr(KonicFinetuningAgent, getter)
        if not is_own and self._given is not None and not self._returns(name, value):
            change = f', or use agent.with_settings({{"{name}": {{...}}}})' if name in _CONFIGS else ""
            has_init = type(self).__init__ is not KonicFinetuningAgent.__init__
            raise ConfigError(
                f"An agent keeps its {name}: give it to {'super().__init__' if has_init else type(self).__name__}"
                f"({name}=...){change}, for another agent."
            )
        if not is_own and self._given is None:
            self.__dict__.setdefault("_assigned", {})[name] = value
        is_property = inspect.getattr_static(type(self), name, None) is vars(KonicFinetuningAgent).get(name, self)
        if (is_property and is_own) or (not is_own and self._given is None):
            self.__dict__[f"_{name}"] = value
        if not is_property:
            super().__setattr__(name, value)

    def get_model_kwargs(self) -> dict[str, Any]:
        """Return a copy of the arguments for `from_pretrained`."""
        return dict(self._model_kwargs)

    def settings(self, uses_lora: bool) -> dict[str, Any]:
        """Return every setting by name, as plain values without secrets; training's own at the top level."""
        lora = self._lora_config
        settings = {
            **self._training_config.model_dump(),
            "model_name": self._base_model,
            "use_lora": uses_lora,
            "learning_rate": self._training_config.peak_learning_rate(uses_lora),
            "kl_penalty_weight": self.kl_penalty_weight,
            "kl_placement": "loss" if self._training_config.kl_in_loss else "reward",
            "generation_config": self._generation_config.model_dump(),
            "dataset_config": self._dataset_config.model_dump(mode="json", exclude={"prompts", "token"}),
            "lora_config": lora.model_dump() if isinstance(lora, LoraConfig) else lora and _plain(lora.to_dict()),
            **KonicLLMRewardComposer.settings(self._reward_composer),
            "model_kwargs": {
                name: _as_json(value) if name == "quantization_config" else str(value)
                for name, value in self._model_kwargs.items()
                if name != "token"
            },
        }
        return {name: redact_all(value) for name, value in settings.items()}

    def with_settings(self, changes: Mapping[str, Mapping[str, Any]]) -> Self:
        """Return a copy of the agent with other settings.

        Args:
            changes: The fields to set, by the name of their config: training_config, generation_config, dataset_config
                or lora_config. Fields that were not set keep following from the others, such as the algorithm's own.

        Raises:
            ConfigError: A config or field does not exist or is invalid, or the agent's class decides it by itself.
        """
        agent = copy.copy(self)
        for name, fields in changes.items():
            if name not in _CONFIGS:
                raise ConfigError(
                    f"An agent has no settings {name!r}.{did_you_mean(name, _CONFIGS)} Those that can be changed "
                    f"are in: {', '.join(_CONFIGS)}."
                )
            current = getattr(agent, f"get_{name}")()
            if current is not getattr(agent, f"_{name}"):
                raise ConfigError(f"{type(self).__name__}.get_{name}() makes its own config: change it there.")
            if current is not None and not isinstance(current, Settings):
                raise ConfigError(f"{name} is PEFT's own: its settings are changed where it is made.")
            setattr(agent, f"_{name}", (LoraConfig() if current is None else current).with_fields(fields))
            agent._method = None if "algorithm" in fields else agent._method
        agent._check_together()
        return agent

    @property
    def kl_penalty_weight(self) -> float:
        """β: the composer's value if it has one, else the training config's value."""
        own = self._reward_composer.kl_penalty_weight
        return self._training_config.kl_penalty_weight if own is None else own


def read_agent(agent: Any, **changes: Any) -> KonicFinetuningAgent:
    """Return an agent with what the getters of any agent return, and other values for some of them.

    A method of konic 0.1 that the agent names stays, unless `changes` set another algorithm.

    Raises:
        ConfigError: The object lacks a getter that is needed, or what one returns is invalid.
    """
    if isinstance(agent, type):
        raise ConfigError(f"The agent must be an instance, got the class {agent.__name__}: add ().")
    missing = [f"{name}()" for name in ("get_base_model", "get_reward_composer") if not hasattr(agent, name)]
    if missing:
        raise ConfigError(
            f"The agent must be a KonicFinetuningAgent, or an object with its getters, got {describe(agent)} without "
            f"{' and '.join(missing)}."
        )
    parts = {name: _get(agent, f"get_{name}") for name in _PARTS if hasattr(agent, f"get_{name}")}
    if "algorithm" not in TrainingConfig.from_value(changes.get("training_config")).model_fields_set:
        parts["method"] = _given_method(agent)
    return KonicFinetuningAgent(**parts | changes)


def _get(agent: Any, getter: str) -> Any:
    value = getattr(agent, getter)
    if not callable(value):
        raise ConfigError(f"The agent's {getter} must be a method, got {describe(value)}.")
    return value()


def _shown_model(value: Any) -> str:
    if hasattr(value, "save_pretrained"):
        return f"{describe(value)}: save it with save_pretrained(folder) and give the folder"
    return describe(value)


def _given_method(agent: Any) -> Any:
    """Return the method of konic 0.1 that an agent names; None where it only follows from the algorithm."""
    getter = getattr(agent, "get_finetuning_method", None)
    if getattr(getter, "__func__", None) is KonicFinetuningAgent.get_finetuning_method:
        return agent._method
    return getter() if getter else None


def with_own_configs(agent: KonicFinetuningAgent) -> KonicFinetuningAgent:
    """Return an agent with copies of its configs, so that what is assigned to them later changes nothing."""
    configs = {name: getattr(agent, f"get_{name}")() for name in _CONFIGS}
    copies = {n: c.model_copy() if isinstance(c, Settings) else copy.deepcopy(c) for n, c in configs.items()}
    return read_agent(agent, **copies)


def _refuse_unknown(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if name not in _SUCCESSORS or value is not None:
            meant = _OTHER_NAMES.get(name)
            hint = f" {_SUCCESSORS[name]}" if name in _SUCCESSORS else did_you_mean(name, _PARTS)
            hint = f" Here it is {meant}." if meant else hint
            raise ConfigError(f"KonicFinetuningAgent has no argument {name!r}.{hint} It has: {', '.join(_PARTS)}.")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with sets as sorted lists, because a set's order differs between processes."""
    return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}


def _as_json(config: Any) -> Any:
    """Return a config of `transformers`, or its dict, as run.json holds it."""
    values = config.to_dict() if hasattr(config, "to_dict") else config
    return json.loads(json.dumps(values, default=lambda value: str(value).removeprefix("torch."), skipkeys=True))


def _lora_config(value: Any) -> Any:
    if value is None or isinstance(value, LoraConfig | Mapping):
        return None if value is None else LoraConfig.from_value(value)
    import peft

    if isinstance(value, peft.LoraConfig) and not isinstance(value, peft.AdaLoraConfig):
        if value.init_lora_weights is False:
            raise ConfigError(
                "lora_config: init_lora_weights=False starts from a random change of the model, so the reference "
                "policy would differ from the model that samples. Set init_lora_weights=True."
            )
        return value
    if isinstance(value, peft.PeftConfig):
        raise ConfigError(
            f"lora_config: {type(value).__name__} is not supported; it would change what the model reads, or how the "
            "reference policy is separated from the model. Use LoraConfig(r=8, lora_alpha=16)."
        )
    raise ConfigError(
        f"lora_config must be a LoraConfig, a dict of its fields or None, got {describe(value)}. Write LoraConfig(r=8)."
    )
