"""(prompts, responses, columns) -> Scores: the user's reward methods and models, weighted and reduced to one number."""

import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

from konic.finetuning.dataset import Prompt
from konic.finetuning.errors import ConfigError, RewardError, did_you_mean
from konic.finetuning.reducers import WeightedSumReducer

Method = TypeVar("Method", bound=Callable[..., Any])
_MARK = "_konic_is_llm_reward"
_RESERVED = ("self", "prompt", "prompts", "response", "responses")


def llm_reward(method: Method) -> Method:
    """Marks a composer's method `(self, prompt: str, response: str)` as a reward.

    It returns a number, a dict of named numbers, or None to abstain. Further parameters are filled with the dataset's
    columns of the same names.
    """
    setattr(method, _MARK, True)
    return method


class RewardModel(Protocol):
    """What :meth:`KonicLLMRewardComposer.add_reward_model` takes: any object with a name that scores in batches."""

    name: str

    def score(self, prompts: list[str], responses: list[str]) -> Sequence[float | None]:
        """One number per response, or None to abstain."""


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch of B responses."""

    rewards: list[float]
    """[B] each sample's reward; NaN where every part abstained."""
    breakdown: dict[str, list[float]]
    """Each part's own values [B], before weights; NaN where it abstained."""

    @property
    def has_score(self) -> list[bool]:
        """[B] False where every part abstained."""
        return [not math.isnan(reward) for reward in self.rewards]

    def filled(self) -> list[float]:
        """[B] the rewards, 0 where there is none."""
        return [0.0 if math.isnan(reward) else reward for reward in self.rewards]

    def scored(self) -> list[float]:
        """The rewards of the samples that have one."""
        return [reward for reward in self.rewards if not math.isnan(reward)]


class KonicLLMRewardComposer:
    """Subclass it and mark methods with :func:`llm_reward`; their values are weighted and reduced to one reward.

    A method that overrides a reward is one too; `name = None` in a subclass takes it away.

    Args:
        reward_models: Objects with a `name` and `score(prompts, responses)`, each with weight 1.
        reward_weights: Weight per reward name; 1 where none is given. A reward that returns a dict gives parts named
            `reward.key`, which may have weights of their own.
        reducer: A class or instance with `reduce(dict[str, float]) -> float`; the class attribute where None.
        kl_penalty_weight: Wins over TrainingConfig's, where given.
    """

    reducer: Any = WeightedSumReducer
    kl_penalty_weight: float | None = None
    _reward_models: dict[str, RewardModel]
    _reward_weights: dict[str, float]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """State is made here, so that a subclass whose `__init__` forgets `super().__init__()` works."""
        self = super().__new__(cls)
        self._reward_models = {}
        self._reward_weights = {}
        return self

    def __init__(
        self,
        reward_models: Sequence[RewardModel] | None = None,
        reward_weights: Mapping[str, float] | None = None,
        reducer: Any = None,
        kl_penalty_weight: float | None = None,
    ) -> None:
        if reward_models is not None and not isinstance(reward_models, Sequence):
            raise ConfigError(f"reward_models must be a list of reward models, got {reward_models!r}.")
        if reward_weights is not None and not isinstance(reward_weights, Mapping):
            raise ConfigError(f"reward_weights must be a dict of numbers by reward name, got {reward_weights!r}.")
        for model in reward_models or ():
            self.add_reward_model(model)
        for name, weight in (reward_weights or {}).items():
            self.set_reward_weight(name, weight)
        if reducer is not None:
            self.reducer = reducer
        if kl_penalty_weight is not None:
            self.kl_penalty_weight = kl_penalty_weight
        _check_kl_penalty_weight(self.kl_penalty_weight)

    @property
    def reward_names(self) -> list[str]:
        """The marked methods in the order they were written, then the reward models."""
        methods = {
            name: None
            for kind in reversed(type(self).__mro__)
            for name in vars(kind)
            if callable(getattr(type(self), name, None))
            and any(_is_marked(vars(other).get(name)) for other in type(self).__mro__)
        }
        return [*methods, *self._reward_models]

    def add_reward_model(self, model: RewardModel, weight: float = 1.0) -> Self:
        """Add a reward model under its name.

        Raises:
            ConfigError: The object cannot score, or its name is taken.
        """
        name = getattr(model, "name", None)
        if not isinstance(name, str) or not callable(getattr(model, "score", None)):
            raise ConfigError(f"A reward model needs a name and a method score(prompts, responses); got {model!r}.")
        if name in self.reward_names:
            raise ConfigError(f"There are two rewards named {name!r}. Give one of them another name.")
        self._reward_models[name] = model
        return self.set_reward_weight(name, weight)

    def set_reward_weight(self, name: str, weight: float) -> Self:
        """Set the factor that a reward, or one part `reward.key` of it, is multiplied by.

        Raises:
            ConfigError: There is no such reward, or the weight is not a finite number.
        """
        known = self.reward_names
        if name not in known and name.split(".", 1)[0] not in known:
            raise ConfigError(
                f"reward_weights: there is no reward {name!r}.{did_you_mean(name, known)} "
                f"The rewards of {type(self).__name__}: {', '.join(known) or 'none'}."
            )
        if not _is_finite_number(weight):
            raise ConfigError(f"reward_weights[{name!r}] must be a finite number, got {weight!r}.")
        self._reward_weights[name] = float(weight)
        return self

    def compose(self, prompt: str, response: str) -> float:
        """The reward of one response; NaN if every part abstains."""
        return self.compose_batch([prompt], [response])[0][0]

    def compose_batch(
        self, prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """The rewards of a batch, and each part's own values before weights; NaN where a part, or all, abstained.

        Args:
            prompts: [B].
            responses: [B].
            columns: The dataset's other columns [B], for rewards that ask for them by parameter name.

        Raises:
            RewardError: A reward raised, or returned something that is not a number.
        """
        samples: list[dict[str, float]] = [{} for _ in prompts]
        for name in self.reward_names:
            values = self._values_of(name, list(prompts), list(responses), columns)
            for parts, value in zip(samples, values, strict=True):
                parts.update(value)
        names = dict.fromkeys(name for parts in samples for name in parts)
        breakdown = {name: [parts.get(name, math.nan) for parts in samples] for name in names}
        rewards = [
            self._reduce(parts, prompt, response)
            for parts, prompt, response in zip(samples, prompts, responses, strict=True)
        ]
        return rewards, breakdown

    def check(self) -> None:
        """Raise RewardError where there is nothing to score with, or a reducer that cannot reduce."""
        if not self.reward_names:
            raise RewardError(
                f"{type(self).__name__} has no rewards. Mark at least one method (self, prompt, response) with "
                "@llm_reward, or add a reward model."
            )
        _check_kl_penalty_weight(self.kl_penalty_weight)
        if not callable(getattr(self.reducer, "reduce", None)):
            raise RewardError(f"{type(self).__name__}.reducer has no method reduce(parts): {self.reducer!r}.")

    def check_columns(self, columns: Mapping[str, Any]) -> None:
        """Raise RewardError where a reward asks for a column that the dataset does not have."""
        for name in self.reward_names:
            if name not in self._reward_models:
                _columns_wanted(name, getattr(self, name), dict.fromkeys(columns, ()))

    def _values_of(
        self, name: str, prompts: list[str], responses: list[str], columns: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, float]]:
        """Each sample's parts from one reward; none where it abstains."""
        if name in self._reward_models:
            try:
                returned = list(self._reward_models[name].score(prompts, responses))
            except Exception as error:
                raise RewardError(f"Reward model {name!r} raised {type(error).__name__}: {error}") from error
            if len(returned) != len(prompts):
                raise RewardError(
                    f"Reward model {name!r} returned {len(returned)} values for {len(prompts)} responses."
                )
        else:
            method = getattr(self, name)
            wanted = _columns_wanted(name, method, columns)
            returned = []
            for index, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
                try:
                    returned.append(method(prompt, response, **{column: columns[column][index] for column in wanted}))
                except Exception as error:
                    told = f"Reward {name!r} raised {type(error).__name__}: {error}"
                    raise RewardError(told + _sample(prompt, response)) from error
        return [_parts(name, *row) for row in zip(returned, prompts, responses, strict=True)]

    def _reduce(self, parts: dict[str, float], prompt: str, response: str) -> float:
        if not parts:
            return math.nan
        weighted = {name: self._weight(name) * value for name, value in parts.items()}
        reducer = self.reducer() if isinstance(self.reducer, type) else self.reducer
        who = f"Reducer {type(reducer).__name__!r}"
        try:
            reduced = reducer.reduce(weighted)
        except Exception as error:
            raise RewardError(f"{who} raised {type(error).__name__}: {error}" + _sample(prompt, response)) from error
        return _number(who, reduced, prompt, response)

    def _weight(self, part: str) -> float:
        return self._reward_weights.get(part, self._reward_weights.get(part.split(".", 1)[0], 1.0))


def _is_marked(member: Any) -> bool:
    return getattr(getattr(member, "__func__", member), _MARK, False)


def _columns_wanted(name: str, method: Callable[..., Any], columns: Mapping[str, Sequence[Any]]) -> list[str]:
    """The dataset columns that a reward's parameters, after prompt and response, ask for."""
    wanted = []
    for parameter in list(inspect.signature(method).parameters.values())[2:]:
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            return list(columns)
        if parameter.name in columns:
            wanted.append(parameter.name)
        elif parameter.default is inspect.Parameter.empty and parameter.kind is not inspect.Parameter.VAR_POSITIONAL:
            raise RewardError(
                f"Reward {name!r} asks for the column {parameter.name!r}, which the dataset does not have."
                f"{did_you_mean(parameter.name, columns)} Its other columns: {', '.join(columns) or 'none'}."
            )
    return wanted


def _parts(name: str, value: Any, prompt: str, response: str) -> dict[str, float]:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        named = {f"{name}.{key}": part for key, part in value.items() if part is not None}
        return {key: _number(f"Reward {key!r}", part, prompt, response) for key, part in named.items()}
    return {name: _number(f"Reward {name!r}", value, prompt, response)}


def _number(who: str, value: Any, prompt: str, response: str) -> float:
    """A reward as a float; scalars of numpy and torch, and booleans, count as what they stand for."""
    number = value
    if callable(getattr(value, "item", None)):
        try:
            number = value.item()
        except (ValueError, RuntimeError):  # an array of several numbers
            number = value
    if not isinstance(number, numbers.Real):
        raise RewardError(f"{who} returned {value!r}, not a number." + _sample(prompt, response))
    try:
        number = float(number)
    except OverflowError:  # an integer past the range of floats
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(f"{who} returned {value!r}, not a finite number." + _sample(prompt, response))
    return number


def _sample(prompt: str, response: str) -> str:
    return f"\n  prompt:   {_shortened(prompt)}\n  response: {_shortened(response)}"


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 200 else repr(text[:200]) + f" … ({len(text)} characters)"


def _check_kl_penalty_weight(weight: Any) -> None:
    if weight is not None and (not _is_finite_number(weight) or weight < 0):
        raise ConfigError(f"kl_penalty_weight must be a number of at least 0, got {weight!r}.")


def _is_finite_number(value: Any) -> bool:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def score(
    composer: KonicLLMRewardComposer, prompts: Sequence[Prompt], texts: list[str], responses: list[str]
) -> Scores:
    """The rewards of a batch of responses; a row's other columns, and `messages` of a chat, go to whoever asks."""
    names = dict.fromkeys(str(name) for prompt in prompts for name in prompt.columns if name not in _RESERVED)
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    if any(not isinstance(prompt.content, str) for prompt in prompts):
        columns["messages"] = [prompt.content if not isinstance(prompt.content, str) else None for prompt in prompts]
    return Scores(*composer.compose_batch(texts, responses, **columns))
