"""The user's rewards: marked methods, functions and models, weighted and reduced to one number per response."""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, Self

from konic.finetuning.data.samples import samples_from_texts
from konic.finetuning.errors import ConfigError, RewardError, did_you_mean
from konic.finetuning.rewards.calls import call_reward
from konic.finetuning.rewards.marks import Mark, checked_clip, find_mark, is_finite_number
from konic.finetuning.rewards.outcomes import Reward
from konic.finetuning.rewards.reducers import WeightedSumReducer
from konic.finetuning.rewards.signatures import detect_shape, requested_columns
from konic.finetuning.rewards.totals import (
    Weighting,
    collect_breakdown,
    collect_parts,
    compute_total,
    require_no_fault,
)


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
        return [reward.name for reward in list_rewards(self)]

    def settings(self) -> dict[str, Any]:
        """What decides a reward: names, weights, the reducer, and the SHA-256 of the rewards' own source lines."""
        kind = self.reducer if isinstance(self.reducer, type) else type(self.reducer)
        rewards = list_rewards(self)
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
        mark = find_mark(function) or Mark(False, False, None)
        clip = checked_clip(clip) or mark.clip
        shape = "batch" if mark.batch and detect_shape(function) == "sample" else detect_shape(function)
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
        if not is_finite_number(weight):
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
        for name, values in {"responses": responses, **columns}.items():
            if len(values) != len(prompts):
                raise RewardError(f"compose_batch: {len(prompts)} prompts, but {len(values)} {name}.")
        samples, weighting = samples_from_texts(prompts, responses, columns), describe_weighting(self)
        called = (call_reward(reward, samples) for reward in weighting.rewards)
        parts = collect_parts([require_no_fault(outcomes, samples) for outcomes in called], len(samples))
        rewards = [compute_total(weighting, own, sample) for own, sample in zip(parts, samples, strict=True)]
        return rewards, collect_breakdown(parts)

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
        for reward in list_rewards(self):
            requested_columns(reward, columns)

    def _add(self, reward: Reward, weight: float) -> Self:
        if reward.name in self.reward_names:
            raise ConfigError(f"There are two rewards named {reward.name!r}. Give one of them another name.")
        self._added[reward.name] = reward
        try:
            return self.set_reward_weight(reward.name, weight)
        except ConfigError:
            del self._added[reward.name]
            raise


def list_rewards(composer: KonicLLMRewardComposer) -> list[Reward]:
    """The marked methods in the order they were written, then the functions and models in the order they were added."""
    kinds = type(composer).__mro__
    names = dict.fromkeys(name for kind in reversed(kinds) for name in vars(kind))
    marks = {name: next((mark for kind in kinds if (mark := find_mark(vars(kind).get(name)))), None) for name in names}
    methods = [
        Reward(name, getattr(composer, name), "batch" if mark.batch else "sample", False, mark.normalize, mark.clip)
        for name, mark in marks.items()
        if mark is not None and callable(getattr(type(composer), name, None))
    ]
    return [*methods, *composer._added.values()]


def describe_weighting(composer: KonicLLMRewardComposer) -> Weighting:
    """What makes one number of the parts of a sample."""
    return Weighting(list_rewards(composer), composer._reward_weights, composer.reducer)


def without_models(composer: KonicLLMRewardComposer) -> KonicLLMRewardComposer:
    """A copy with the marked methods and functions alone: what a worker process gets."""
    copied: KonicLLMRewardComposer = object.__new__(type(composer))
    copied.__dict__.update(composer.__dict__)
    copied._added = {name: reward for name, reward in composer._added.items() if not reward.is_model}
    copied._reward_weights = dict(composer._reward_weights)
    copied.__dict__.pop("reducer", None)  # it stays with the weights
    return copied


def _check_kl_penalty_weight(weight: Any) -> None:
    if weight is not None and (not is_finite_number(weight) or weight < 0):
        raise ConfigError(f"kl_penalty_weight must be a number of at least 0, got {weight!r}.")


def _source_of(reward: Reward) -> str:
    """A reward's source lines; its name alone where there are none, or where it is a model's."""
    try:
        return "" if reward.is_model else inspect.getsource(inspect.unwrap(reward.call))
    except (OSError, TypeError, ValueError):  # written in a notebook or an interactive session, or not in Python
        return ""
