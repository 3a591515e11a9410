"""What scripts of konic 0.1 call otherwise in a composer (docs/coming-from-0.1.md)."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from konic.finetuning.errors import ConfigError, no_attribute
from konic.finetuning.rewards.marks import is_finite_number
from konic.finetuning.rewards.validation import check_kl_penalty_weight

_Init = TypeVar("_Init", bound=Callable[..., None])
_SUCCESSORS = {
    "set_env": "A reward gets the columns of the dataset by parameters of their names.",
    "env": "A reward gets the columns of the dataset by parameters of their names.",
    "reward_weights": "set_reward_weight(name, weight) sets one; reward_weights={...} may be assigned.",
    "compute_kl_penalty": "The run computes the exact KL; kl_penalty_weight is its price.",
}
"""For what konic 0.1 had in a composer: what to use instead."""


def with_the_places_of_0_1(init: _Init) -> _Init:
    """Let `kl_penalty_weight` come before `reducer` where both are given by place, as in konic 0.1."""

    @functools.wraps(init)
    def read(self: Any, *places: Any, **named: Any) -> None:
        own, later = places[:2], places[2:]
        if later and len(later) <= 3 and (is_finite_number(later[0]) or hasattr([*later, None][1], "reduce")):
            by_place = zip(("kl_penalty_weight", "reducer", "reward_functions"), later, strict=False)
            init(self, *own, **dict(by_place), **named)
        else:
            init(self, *places, **named)

    return read  # type: ignore[return-value]


class OldNames:
    """Base of the composer, with the names of konic 0.1."""

    kl_penalty_weight: float | None

    @classmethod
    def _take_old_names(cls) -> None:
        """Let `_kl_penalty_weight`, which scripts of konic 0.1 set in the class, count as `kl_penalty_weight`."""
        ours = vars(OldNames)["_kl_penalty_weight"]
        old = inspect.getattr_static(cls, "_kl_penalty_weight")
        if old is ours:
            return
        if vars(cls).get("kl_penalty_weight", old) != old:
            raise ConfigError(f"{cls.__name__} has kl_penalty_weight and _kl_penalty_weight. Keep kl_penalty_weight.")
        if not isinstance(old, property):
            check_kl_penalty_weight(old)
        cls.kl_penalty_weight, cls._kl_penalty_weight = old, ours  # type: ignore[method-assign]

    @property
    def _kl_penalty_weight(self) -> float:
        """What konic 0.1 called so."""
        return self.kl_penalty_weight or 0.0

    @_kl_penalty_weight.setter
    def _kl_penalty_weight(self, weight: float) -> None:
        check_kl_penalty_weight(weight)
        self.kl_penalty_weight = weight

    def __getattr__(self, name: str) -> Any:
        raise no_attribute(self, name, _SUCCESSORS)
