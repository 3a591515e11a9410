"""The user's rewards: marked methods, functions and models, weighted and reduced to one number per response."""

import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol, Self

from konic.finetuning.arguments import with_known_arguments
from konic.finetuning.data.samples import samples_from_texts
from konic.finetuning.errors import ConfigError, RewardError, did_you_mean
from konic.finetuning.rewards.calls import call_reward
from konic.finetuning.rewards.listing import check_marked_methods, list_rewards, names_of, reward_of_function
from konic.finetuning.rewards.marks import checked_weights, find_mark
from konic.finetuning.rewards.old_names import OldNames, with_the_places_of_0_1
from konic.finetuning.rewards.origin import Origin, find_origin
from konic.finetuning.rewards.outcomes import Reward
from konic.finetuning.rewards.reducers import WeightedSumReducer, reducer_of
from konic.finetuning.rewards.signatures import requested_columns, require_a_response, reward_of_model
from konic.finetuning.rewards.totals import (
    AlreadyScored,
    Weighting,
    collect_breakdown,
    collect_parts,
    compute_total,
    named_by_part,
    require_no_fault,
)
from konic.finetuning.rewards.validation import check_kl_penalty_weight, check_reducer
from konic.output import get_logger

logger = get_logger(__name__)

_NAMED_TWICE = "There are two rewards named {!r}. Give one of them another name."


class RewardModel(Protocol):
    """Interface for :meth:`KonicLLMRewardComposer.add_reward_model`: any object with a name that scores in batches."""

    name: str

    def score(self, prompts: list[str], responses: list[str]) -> Sequence[float | None]:
        """Return per response a number, or None to abstain. Further parameters receive the dataset's columns."""


class BaseRewardModel:
    """Base class of one's own reward models; any object that :class:`RewardModel` describes serves."""


class KonicLLMRewardComposer(OldNames):
    """Base class of the user's rewards: subclass it and mark methods with :func:`llm_reward`.

    The values of all rewards are weighted and reduced to one reward per response. A method that overrides a reward is
    a reward too, marked or not; `name = None` in a subclass removes the reward of that name.

    Args:
        reward_models: Objects with a `name` and `score(prompts, responses)`, each with weight 1.
        reward_weights: Weight per reward name; the default is 1, or what the class has under this name. A reward that
            returns a dict has parts named `reward.key`, and each part may have its own weight.
        reducer: A class or instance with `reduce(dict[str, float]) -> float`; None uses the class attribute. A class
            that can be called with `weights=` gets the weights so, and the parts before weights.
        kl_penalty_weight: Overrides TrainingConfig's, if given.
        reward_functions: Plain functions, as :meth:`add_reward_function` takes them.
    """

    reducer: Any = WeightedSumReducer
    kl_penalty_weight: float | None = None
    _added: dict[str, Reward]
    """Functions by name."""
    _reward_models: Sequence[Any] | None
    """As in konic 0.1, whose scripts assign it."""
    _reward_weights: dict[str, float]
    _unknown_weights: set[str]
    """Names that no reward had when a weight was set for them; a warning has named them."""
    _has_warned_of_unread: bool = False
    _scored: AlreadyScored | None = None
    _origin: Origin | None = None
    """Kept where it is sent to another process."""
    _marked: tuple[str, ...] = ()
    """Names of the marked methods, in the order they were written."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse rewards whose name is one that a composer has a use for itself."""
        super().__init_subclass__(**kwargs)
        check_marked_methods(
            cls, {*vars(KonicLLMRewardComposer), *vars(OldNames), *KonicLLMRewardComposer.__annotations__}
        )
        cls._take_old_names()
        # a class that is sent to another process by value comes with its members sorted by name
        cls._marked = tuple(
            name for name in names_of(cls) if any(find_mark(vars(kind).get(name)) for kind in cls.__mro__)
        )

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Create the state here, so that a subclass works even if its `__init__` never calls `super().__init__()`.

        It starts from what the class has under these names.
        """
        self = super().__new__(cls)
        models = getattr(cls, "_reward_models", None)
        self._added, self._reward_models = {}, list(models) if isinstance(models, list | tuple) else models or []
        self._reward_weights = checked_weights(getattr(cls, "_reward_weights", None) or {})
        self._unknown_weights = set()
        weights = getattr(cls, "reward_weights", None)
        if weights is not None:
            self.reward_weights = checked_weights(weights)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        """Let `reward_weights` that is assigned count, as that of the class does; a later change of the dict too.

        An attribute of that name that holds anything else is the script's own.
        """
        is_flat = isinstance(value, Mapping) and not any(isinstance(x, Mapping | list | tuple) for x in value.values())
        if name == "reward_weights" and is_flat:
            value = self._reward_weights = checked_weights(value)
        super().__setattr__(name, value)

    @with_known_arguments
    @with_the_places_of_0_1
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
        weights = checked_weights({} if reward_weights is None else reward_weights)
        for function in reward_functions or ():
            self.add_reward_function(function)
        for model in reward_models or ():
            self.add_reward_model(model)
        for name, weight in weights.items():
            self.set_reward_weight(name, weight)
        if reducer is not None:
            self.reducer = reducer_of(reducer)
            check_reducer(type(self), self.reducer)
        if kl_penalty_weight is not None:
            self.kl_penalty_weight = kl_penalty_weight
        check_kl_penalty_weight(self.kl_penalty_weight)

    @property
    def reward_names(self) -> list[str]:
        """Names of the marked methods in the order they were written, then of added functions, then of models."""
        return [reward.name for reward in list_rewards(self)]

    def settings(self) -> dict[str, Any]:
        """The settings that determine a reward: names, weights, reducer, SHA-256 of the rewards' own source lines."""
        reducer = reducer_of(self.reducer)
        kind = reducer if isinstance(reducer, type) else type(reducer)
        rewards = list_rewards(self)
        sources = "\n".join(f"{name}: {source}" for name, source in origin_of(self).sources)
        return {
            "rewards": [reward.name for reward in rewards],
            "reward_weights": dict(self._reward_weights),
            "reducer": kind.__qualname__,
            "rewards_sha256": hashlib.sha256(sources.encode()).hexdigest(),
        }

    def add_reward_model(self, model: RewardModel, weight: float | None = None) -> Self:
        """Add a reward model under its own name. It has a method `score(prompts, responses)`, or one of konic 0.1:
        `batch_compute_reward(prompts, responses)` or `compute_reward(prompt, response)`.

        If its attribute `normalize` is True, its values are normalised as in `@llm_reward(normalize=True)`. Without a
        `weight` it keeps the one that was set for its name, else 1.

        Raises:
            ConfigError: The object has no name or no method `score`, or its name is already in use.
        """
        reward, before = reward_of_model(model), self._reward_models or ()
        self._require_new(reward.name)
        self._reward_models = [*before, model]
        try:
            return self._weigh_added(reward.name, weight)
        except ConfigError:
            self._reward_models = before
            raise

    def add_reward_function(
        self,
        function: Callable[..., Any],
        weight: float | None = None,
        name: str | None = None,
        normalize: bool = False,
        clip: tuple[float, float] | None = None,
    ) -> Self:
        """Add a plain function, `async` or not, under its own name or under `name`; `weight` is as for models.

        Its parameter names decide how it is called: `(prompt, response)` with one response, `(prompts, responses)` with
        a whole batch, or TRL's `(prompts, completions, **columns)`, where `prompts` may be left out.

        Raises:
            ConfigError: The name is already in use, or the function has none.
            RewardError: The function has other parameters.
        """
        reward = reward_of_function(function, name, normalize, clip)
        self._require_new(reward.name)
        self._added[reward.name] = reward
        try:
            return self._weigh_added(reward.name, weight)
        except ConfigError:
            del self._added[reward.name]
            raise

    def set_reward_weight(self, name: str, weight: float) -> Self:
        """Set the factor that multiplies a reward, or one of its parts: `reward.key`, or `key` alone.

        A name that no reward has is a warning, because a reward may be switched off, or come later, or return a dict.

        Raises:
            ConfigError: The weight is not a finite number.
        """
        ((name, weight),) = checked_weights({name: weight}).items()
        known = [reward.name for reward in list_rewards(self)]
        is_known = any(name == reward or name.startswith(f"{reward}.") for reward in known)
        if not is_known and name not in self._reward_weights:
            self._unknown_weights.add(name)
            logger.warning(
                "reward_weights: %s has no reward %r.%s Its weight counts only for a reward that is added later, or "
                "for this key of a reward that returns a dict.",
                type(self).__name__, name, did_you_mean(name, known),
            )  # fmt: skip
        self._reward_weights[name] = weight
        return self

    def compose(self, prompt: str, response: str) -> float:
        """The reward of one response; NaN if every part abstains, and 0 if there are no rewards.

        A subclass may score in its own way.
        """
        if not self._known_rewards():
            return 0.0
        return KonicLLMRewardComposer.compose_batch(self, [prompt], [response])[0][0]

    def get_reward_breakdown(self, prompt: str, response: str) -> dict[str, float]:
        """The parts of one response's reward, before weights."""
        breakdown = KonicLLMRewardComposer.compose_batch(self, [prompt], [response])[1]
        return named_by_part(list_rewards(self), {name: value for name, (value,) in breakdown.items()})

    def compose_batch(
        self, prompts: Sequence[str], responses: Sequence[str], **columns: Sequence[Any]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Return the rewards of a batch, and each part's own values before weights.

        A subclass may override it, or :meth:`compose`, to score in its own way. A run then calls the marked methods
        first, and answers `super().compose_batch(...)` with their values. Where one class has both, this one counts.

        A part's value is NaN if the part abstained; a reward is NaN if every part abstained, and 0 without rewards. For
        the reward, values are clipped if their part has bounds. They are not normalised: only training has a running
        mean.

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
        rewards = self._known_rewards()
        if not rewards:  # compose is a subclass's own, or answers 0
            return [self.compose(*texts) for texts in zip(prompts, responses, strict=True)], {}
        answer = self._scored.find(prompts, responses) if self._scored is not None else None
        if answer is not None:
            return answer[0], named_by_part(rewards, answer[1])
        weighting = describe_weighting(self)
        samples = samples_from_texts(prompts, responses, columns)
        called = (call_reward(reward, samples) for reward in rewards)
        parts = collect_parts([require_no_fault(outcomes, samples) for outcomes in called], len(samples))
        totals = [compute_total(weighting, own, sample) for own, sample in zip(parts, samples, strict=True)]
        return totals, named_by_part(rewards, collect_breakdown(parts))

    def check(self) -> None:
        """Raise RewardError if the composer cannot score, or if its reducer has no method `reduce`."""
        if not list_rewards(self) and find_override(self) is None:
            raise RewardError(
                f"{type(self).__name__} has no rewards. Mark at least one method (self, prompt, response) with "
                "@llm_reward, or add a reward model or function."
            )
        rewards = list_rewards(self)  # a script may have `reward_names` of its own
        names = [reward.name for reward in rewards]
        for reward in rewards:
            if names.count(reward.name) > 1:
                raise ConfigError(_NAMED_TWICE.format(reward.name))
            owner = next((name for name in names if reward.name.startswith(f"{name}.")), None)
            if owner is not None and not reward.is_model:  # models have names such as judge_v1.5
                raise ConfigError(
                    f"A reward is named {reward.name!r}, as a part of {owner!r} would be. Give it another name."
                )
            require_a_response(reward)
        self._warn_of_unread()
        checked_weights(self._reward_weights, f"{type(self).__name__}._reward_weights")
        check_kl_penalty_weight(self.kl_penalty_weight)
        check_reducer(type(self), reducer_of(self.reducer))

    def check_columns(self, columns: Mapping[str, Any]) -> None:
        """Raise RewardError if a reward asks for a column that the dataset does not have."""
        for reward in _list_all(self):
            requested_columns(reward, columns)

    @contextmanager
    def answering(self, scored: AlreadyScored) -> Iterator[None]:
        """Within the block, :meth:`compose_batch` and :meth:`compose` of this class answer with known values."""
        self._scored = scored
        try:
            yield
        finally:
            self._scored = None

    def _known_rewards(self) -> Sequence[Reward]:
        """The rewards; while a run asks for the total of values that it has, those that it called."""
        return list_rewards(self) if self._scored is None else self._scored.rewards

    def _require_new(self, name: str) -> None:
        if any(name == reward.name for reward in list_rewards(self)):
            raise ConfigError(_NAMED_TWICE.format(name))

    def _warn_of_unread(self) -> None:
        """Warn once of rewards that the class or a script has put into an attribute that counts nowhere."""
        used = [*(reward.call for reward in list_rewards(self)), *(self._reward_models or ())]
        for name in () if self._has_warned_of_unread else ("reward_models", "reward_functions"):
            given = inspect.getattr_static(self, name, None)
            for each in given if isinstance(given, list | tuple) else ():
                is_reward = callable(getattr(each, "score", each)) and not isinstance(each, type)
                if is_reward and not any(each is one or each == one for one in used):
                    self._has_warned_of_unread = True
                    logger.warning(
                        "%s.%s: %.200r is no reward by being there. Give it to add_%s(), or as the composer's argument "
                        "%s; if a reward of yours uses it, rename the attribute.",
                        type(self).__name__, name, each, name[:-1], name,
                    )  # fmt: skip

    def _weigh_added(self, name: str, weight: float | None) -> Self:
        """Set the weight of a reward that is added: the one given, else the one that was set before, else 1."""
        return self.set_reward_weight(name, self._reward_weights.get(name, 1.0) if weight is None else weight)


def find_override(composer: KonicLLMRewardComposer) -> Reward | None:
    """The composer's own `compose_batch` or `compose`, as a reward; None if it has only those of this class.

    One that is set on the object counts before those of its classes.
    """
    kinds = type(composer).__mro__[: type(composer).__mro__.index(KonicLLMRewardComposer)]
    for own in (vars(composer), *map(vars, kinds)):
        for name, shape in _SHAPE_OF_OVERRIDE.items():
            if name in own:
                return Reward(f"{type(composer).__name__}.{name}", getattr(composer, name), shape)
    return None


_SHAPE_OF_OVERRIDE: dict[str, Literal["sample", "batch"]] = {"compose_batch": "batch", "compose": "sample"}


def _list_all(composer: KonicLLMRewardComposer) -> list[Reward]:
    """The rewards, and the composer's own method that makes their total, if it has one."""
    override = find_override(composer)
    return [*list_rewards(composer), *([override] if override else [])]


def origin_of(composer: KonicLLMRewardComposer) -> Origin:
    """Where a composer was written: as it was kept, or as Python finds it now."""
    return composer._origin or find_origin(type(composer), _list_all(composer))


def keep_origin(composer: KonicLLMRewardComposer) -> None:
    """Let a composer that is sent to another process by value know there where it was written."""
    vars(composer)["_origin"] = find_origin(type(composer), _list_all(composer))


def describe_weighting(composer: KonicLLMRewardComposer) -> Weighting:
    """The composer's rewards, weights and reducer, which turn a sample's parts into one number."""
    return Weighting(list_rewards(composer), composer._reward_weights, reducer_of(composer.reducer))


def without_models(composer: KonicLLMRewardComposer) -> KonicLLMRewardComposer:
    """A copy without reward models, for a worker process: it keeps the marked methods and the functions."""
    copied: KonicLLMRewardComposer = object.__new__(type(composer))
    copied.__dict__.update(composer.__dict__)
    copied._added, copied._reward_models = dict(composer._added), []
    take_weights(copied, composer._reward_weights)
    for name in ("reducer", *_SHAPE_OF_OVERRIDE):  # only the run's own process weights and reduces
        copied.__dict__.pop(name, None)
    return copied


def own_weights(composer: KonicLLMRewardComposer) -> dict[str, float]:
    """Return the weights that the class or `set_reward_weight` gave, by name."""
    return dict(composer._reward_weights)


def take_weights(composer: KonicLLMRewardComposer, weights: Mapping[str, float]) -> None:
    """Give a composer the weights of another process's."""
    composer._reward_weights = dict(weights)
    if "reward_weights" in vars(composer):
        composer.reward_weights = composer._reward_weights


def unknown_weights(composer: KonicLLMRewardComposer) -> set[str]:
    """Return the names that a warning has named because no reward had them when a weight was set for them."""
    return composer._unknown_weights
