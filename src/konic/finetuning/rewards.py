"""The user's rewards: marked methods, functions and models, weighted and reduced to one number per response."""

import hashlib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar, overload

from konic.finetuning.errors import ConfigError, RewardError, did_you_mean
from konic.finetuning.moments import RunningMoments
from konic.finetuning.reducers import WeightedSumReducer
from konic.finetuning.reward_calls import (
    Fault,
    NotANumberError,
    Outcome,
    Parts,
    Reward,
    call_reward,
    columns_wanted,
    number,
    sample_text,
    shape_of,
)

Method = TypeVar("Method", bound=Callable[..., Any])
_MARK = "_konic_llm_reward"


@dataclass(frozen=True)
class _Mark:
    batch: bool
    normalize: bool
    clip: tuple[float, float] | None


@overload
def llm_reward(method: Method) -> Method: ...
@overload
def llm_reward(
    *, batch: bool = False, normalize: bool = False, clip: tuple[float, float] | None = None
) -> Callable[[Method], Method]: ...
def llm_reward(
    method: Any = None, *, batch: bool = False, normalize: bool = False, clip: tuple[float, float] | None = None
) -> Any:
    """Marks a composer's method `(self, prompt: str, response: str)` as a reward; it may be `async`.

    It returns a number, a dict of named numbers, or None to abstain. Further parameters are filled with the dataset's
    columns of the same names, and `messages` with the chat that a prompt came from.

    Args:
        method: The method, where the mark is used without brackets.
        batch: The method is `(self, prompts, responses)` and returns a list with a value per response.
        normalize: In training, count each value in standard deviations from the running mean of its part.
        clip: The lowest and the highest value that count, after normalising.

    Raises:
        ConfigError: Bounds in the wrong order.
    """
    mark = _Mark(batch, normalize, _checked_clip(clip))

    def marked(function: Any) -> Any:
        if not callable(function):
            raise ConfigError(f"@llm_reward marks a method, got {function!r}. Its options are named: batch=, clip=.")
        setattr(function, _MARK, mark)
        return function

    return marked if method is None else marked(method)


class RewardModel(Protocol):
    """What :meth:`KonicLLMRewardComposer.add_reward_model` takes: any object with a name that scores in batches."""

    name: str

    def score(self, prompts: list[str], responses: list[str]) -> Sequence[float | None]:
        """One number per response, or None to abstain; further parameters are filled with the dataset's columns."""


class KonicLLMRewardComposer:
    """Subclass it and mark methods with :func:`llm_reward`; their values are weighted and reduced to one reward.

    A method that overrides a reward is one too; `name = None` in a subclass takes it away.

    Args:
        reward_models: Objects with a `name` and `score(prompts, responses)`, each with weight 1.
        reward_weights: Weight per reward name; 1 where none is given. A reward that returns a dict gives parts named
            `reward.key`, which may have weights of their own.
        reducer: A class or instance with `reduce(dict[str, float]) -> float`; the class attribute where None.
        kl_penalty_weight: Wins over TrainingConfig's, where given.
        reward_functions: Plain functions, as :meth:`add_reward_function` takes them.
    """

    reducer: Any = WeightedSumReducer
    kl_penalty_weight: float | None = None
    _added: dict[str, Reward]
    _reward_weights: dict[str, float]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """State is made here, so that a subclass whose `__init__` forgets `super().__init__()` works."""
        self = super().__new__(cls)
        self._added = {}
        self._reward_weights = {}
        return self

    def __init__(
        self,
        reward_models: Sequence[RewardModel] | None = None,
        reward_weights: Mapping[str, float] | None = None,
        reducer: Any = None,
        kl_penalty_weight: float | None = None,
        reward_functions: Sequence[Callable[..., Any]] | None = None,
    ) -> None:
        for option, given in (("reward_models", reward_models), ("reward_functions", reward_functions)):
            if given is not None and not isinstance(given, Sequence):
                raise ConfigError(f"{option} must be a list, got {given!r}.")
        if reward_weights is not None and not isinstance(reward_weights, Mapping):
            raise ConfigError(f"reward_weights must be a dict of numbers by reward name, got {reward_weights!r}.")
        for function in reward_functions or ():
            self.add_reward_function(function)
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
        """The marked methods in the order they were written, then what was added."""
        return [reward.name for reward in rewards_of(self)]

    def settings(self) -> dict[str, Any]:
        """What decides a reward: names, weights, the reducer, and the SHA-256 of the rewards' own source lines."""
        kind = self.reducer if isinstance(self.reducer, type) else type(self.reducer)
        rewards = rewards_of(self)
        sources = "\n".join(f"{reward.name}: {_source_of(reward)}" for reward in rewards)
        return {
            "rewards": [reward.name for reward in rewards],
            "reward_weights": dict(self._reward_weights),
            "reducer": kind.__qualname__,
            "rewards_sha256": hashlib.sha256(sources.encode()).hexdigest(),
        }

    def add_reward_model(self, model: RewardModel, weight: float = 1.0) -> Self:
        """Add a reward model under its name. One whose `normalize` is true is normalised, as a marked method may be.

        Raises:
            ConfigError: The object cannot score, or its name is taken.
        """
        name = getattr(model, "name", None)
        if not isinstance(name, str) or not callable(getattr(model, "score", None)):
            advice = " Plain functions go to add_reward_function." if callable(model) else ""
            raise ConfigError(
                f"A reward model needs a name and a method score(prompts, responses); got {model!r}.{advice}"
            )
        normalize = getattr(model, "normalize", False) is True
        return self._add(Reward(name, model.score, "batch", is_model=True, normalize=normalize), weight)

    def add_reward_function(
        self,
        function: Callable[..., Any],
        weight: float = 1.0,
        name: str | None = None,
        normalize: bool = False,
        clip: tuple[float, float] | None = None,
    ) -> Self:
        """Add a plain function, `async` or not, under its own name or another.

        Its parameters say what it takes: `(prompt, response)`, `(prompts, responses)` for a whole batch, or TRL's
        `(prompts, completions, **columns)`, which may leave out the prompts.

        Raises:
            ConfigError: Its name is taken, or it has none.
            RewardError: It takes something else.
        """
        if not callable(function) or isinstance(function, type):
            raise ConfigError(f"A reward function must be a function, got {function!r}.")
        name = name or getattr(function, "__name__", None)
        if not name or name == "<lambda>":
            raise ConfigError(
                f"The reward function {function!r} has no name: give add_reward_function(..., name='...')."
            )
        mark = _mark_of(function) or _Mark(False, False, None)
        clip = _checked_clip(clip) or mark.clip
        shape = "batch" if mark.batch and shape_of(function) == "sample" else shape_of(function)
        return self._add(Reward(name, function, shape, normalize=normalize or mark.normalize, clip=clip), weight)

    def set_reward_weight(self, name: str, weight: float) -> Self:
        """Set the factor that a reward, or one part `reward.key` of it, is multiplied by.

        Raises:
            ConfigError: There is no such reward, or the weight is not a finite number.
        """
        known = self.reward_names
        name = str(name)
        if not any(name == reward or name.startswith(f"{reward}.") for reward in known):
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

        Values are clipped where a reward has bounds; they are normalised in training only, which has a running mean.

        Args:
            prompts: [B].
            responses: [B].
            columns: The dataset's other columns [B], for rewards that ask for them by parameter name.

        Raises:
            RewardError: A reward raised, or returned something that is not a number.
        """
        texts = list(prompts), list(responses)
        for name, values in {"responses": responses, **columns}.items():
            if len(values) != len(prompts):
                raise RewardError(f"compose_batch: {len(prompts)} prompts, but {len(values)} {name}.")
        called = (call_reward(reward, *texts, columns) for reward in rewards_of(self))
        samples = merged([require_no_fault(outcomes, *texts) for outcomes in called], len(texts[0]))
        rewards = [total_of(self, *sample) for sample in zip(samples, *texts, strict=True)]
        return rewards, breakdown_of(samples)

    def check(self) -> None:
        """Raise RewardError where there is nothing to score with, or a reducer that cannot reduce."""
        if not self.reward_names:
            raise RewardError(
                f"{type(self).__name__} has no rewards. Mark at least one method (self, prompt, response) with "
                "@llm_reward, or add a reward model or function."
            )
        _check_kl_penalty_weight(self.kl_penalty_weight)
        if not callable(getattr(self.reducer, "reduce", None)):
            raise RewardError(f"{type(self).__name__}.reducer has no method reduce(parts): {self.reducer!r}.")

    def check_columns(self, columns: Mapping[str, Any]) -> None:
        """Raise RewardError where a reward asks for a column that the dataset does not have."""
        for reward in rewards_of(self):
            columns_wanted(reward, columns)

    def _add(self, reward: Reward, weight: float) -> Self:
        if reward.name in self.reward_names:
            raise ConfigError(f"There are two rewards named {reward.name!r}. Give one of them another name.")
        self._added[reward.name] = reward
        try:
            return self.set_reward_weight(reward.name, weight)
        except ConfigError:
            del self._added[reward.name]
            raise


def rewards_of(composer: KonicLLMRewardComposer) -> list[Reward]:
    """The marked methods in the order they were written, then the functions and models in the order they were added."""
    kinds = type(composer).__mro__
    names = dict.fromkeys(name for kind in reversed(kinds) for name in vars(kind))
    marks = {name: next((mark for kind in kinds if (mark := _mark_of(vars(kind).get(name)))), None) for name in names}
    methods = [
        Reward(name, getattr(composer, name), "batch" if mark.batch else "sample", False, mark.normalize, mark.clip)
        for name, mark in marks.items()
        if mark is not None and callable(getattr(type(composer), name, None))
    ]
    return [*methods, *composer._added.values()]


def without_models(composer: KonicLLMRewardComposer) -> KonicLLMRewardComposer:
    """A copy with the marked methods and functions alone: what a worker process gets."""
    copied: KonicLLMRewardComposer = object.__new__(type(composer))
    copied.__dict__.update(composer.__dict__)
    copied._added = {name: reward for name, reward in composer._added.items() if not reward.is_model}
    copied._reward_weights = dict(composer._reward_weights)
    copied.__dict__.pop("reducer", None)  # it stays with the weights
    return copied


def total_of(
    composer: KonicLLMRewardComposer,
    parts: Parts,
    prompt: str,
    response: str,
    moments: Mapping[str, RunningMoments] | None = None,
) -> float:
    """The reward of a sample's parts: each normalised, clipped and weighted, then reduced; NaN of none.

    Raises:
        RewardError: The reducer raised, or returned something that is not a number.
    """
    if not parts:
        return math.nan
    weighted = weighted_parts(composer, parts, moments)
    reducer = composer.reducer
    who = f"Reducer {(reducer if isinstance(reducer, type) else type(reducer)).__name__!r}"
    try:
        return number((reducer() if isinstance(reducer, type) else reducer).reduce(weighted))
    except NotANumberError as error:
        raise RewardError(f"{who} {error}" + sample_text(prompt, response)) from None
    except Exception as error:
        raise RewardError(f"{who} raised {type(error).__name__}: {error}" + sample_text(prompt, response)) from error


def weighted_parts(
    composer: KonicLLMRewardComposer, parts: Parts, moments: Mapping[str, RunningMoments] | None = None
) -> Parts:
    """What the reducer gets: each part normalised, clipped and multiplied by its weight."""
    weights, weighted = composer._reward_weights, {}
    for part, reward in owners_of(composer, parts).items():
        value = parts[part]
        if reward.normalize:
            value = (moments or {}).get(part, RunningMoments()).normalised(value)
        if reward.clip is not None:
            value = min(max(value, reward.clip[0]), reward.clip[1])
        weighted[part] = weights.get(part, weights.get(reward.name, 1.0)) * value
    return weighted


def owners_of(composer: KonicLLMRewardComposer, parts: Iterable[str]) -> dict[str, Reward]:
    """The reward that each part came from: the one of its own name, or of the name before `.key`, if any."""
    rewards = {reward.name: reward for reward in rewards_of(composer)}
    before_key = {part: [name for name in rewards if part == name or part.startswith(f"{name}.")] for part in parts}
    return {part: rewards[max(names, key=len)] for part, names in before_key.items() if names}


def require_no_fault(outcomes: Iterable[Outcome], prompts: Sequence[str], responses: Sequence[str]) -> list[Parts]:
    """The outcomes of a batch; the first fault among them is raised."""
    parts: list[Parts] = []
    for outcome, prompt, response in zip(outcomes, prompts, responses, strict=True):
        if isinstance(outcome, Fault):
            raise outcome.error(prompt, response)
        parts.append(outcome)
    return parts


def merged(outcomes: Sequence[Sequence[Outcome]], count: int) -> list[Parts]:
    """Each sample's parts from all rewards; a fault gives none."""
    samples: list[Parts] = [{} for _ in range(count)]
    for of_one_reward in outcomes:
        for parts, outcome in zip(samples, of_one_reward, strict=True):
            if not isinstance(outcome, Fault):
                parts.update(outcome)
    return samples


def breakdown_of(samples: Sequence[Parts]) -> dict[str, list[float]]:
    """Each part's values over the samples; NaN where there is none."""
    names = dict.fromkeys(name for parts in samples for name in parts)
    return {name: [parts.get(name, math.nan) for parts in samples] for name in names}


def _mark_of(member: Any) -> _Mark | None:
    return getattr(member, _MARK, None) or getattr(getattr(member, "__func__", None), _MARK, None)


def _checked_clip(clip: Any) -> tuple[float, float] | None:
    if clip is None:
        return None
    is_pair = isinstance(clip, Sequence) and len(clip) == 2 and all(_is_finite_number(bound) for bound in clip)
    if not is_pair or clip[0] >= clip[1]:
        raise ConfigError(f"clip must be a lower and a higher bound, such as (-1.0, 1.0); got {clip!r}.")
    return float(clip[0]), float(clip[1])


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


def _source_of(reward: Reward) -> str:
    """A reward's source lines; its name alone where there are none, or where it is a model's."""
    try:
        return "" if reward.is_model else inspect.getsource(inspect.unwrap(reward.call))
    except (OSError, TypeError, ValueError):  # written in a notebook or an interactive session, or not in Python
        return ""
