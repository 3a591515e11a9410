"""Values by part, for the user's code: each part answers to its full name and to its key."""

from collections.abc import Iterable, Mapping
from typing import Any, Self, TypeVar

from konic.finetuning.errors import RewardError

_T = TypeVar("_T")


class NamedParts(dict[str, _T]):
    """Values by the name of a part, each once; a part also answers to its other name, `reward.key` or `key`.

    Args:
        values: By the names that are listed.
        others: The listed names that another name stands for, by that name.
        names: By listed name, those that a weight of the part may be given for, the first that has one counts.

    Raises:
        RewardError: Several parts have the name that is asked for.
    """

    def __init__(
        self,
        values: Mapping[str, _T] | Iterable[tuple[str, _T]] = (),
        others: Mapping[str, list[str]] | None = None,
        names: Mapping[str, list[str]] | None = None,
    ) -> None:
        super().__init__(values)
        self._others, self._names = dict(others or {}), dict(names or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self), self._others, self._names)

    def names_of(self, name: str) -> list[str]:
        """The names that a weight of a listed part may be given for: the part's, its key, its reward's."""
        return self._names.get(name, [name])

    def _part(self, name: str) -> str:
        parts = [] if super().__contains__(name) else self._others.get(name, [])
        if len(parts) > 1:
            raise RewardError(f"{name!r} is the key of several parts: ask for one of {', '.join(parts)}.")
        return parts[0] if parts else name

    def __getitem__(self, name: str) -> _T:
        return super().__getitem__(self._part(name))

    def __setitem__(self, name: str, value: _T) -> None:
        super().__setitem__(self._part(name), value)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(self._part(name))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(self._part(str(name)))

    def __or__(self, more: Any) -> Any:
        return self.copy().__ior__(more)

    def __ior__(self, more: Any) -> Self:  # type: ignore[override]
        self.update(more)
        return self

    def get(self, name: str, default: Any = None) -> Any:  # noqa: D102
        return super().get(self._part(name), default)

    def pop(self, name: str, *default: Any) -> Any:  # noqa: D102
        return super().pop(self._part(name), *default)

    def setdefault(self, name: str, default: Any = None) -> Any:  # noqa: D102
        return super().setdefault(self._part(name), default)

    def update(self, *more: Any, **values: _T) -> None:  # noqa: D102
        for name, value in dict(*more, **values).items():
            self[name] = value

    def copy(self) -> Self:  # noqa: D102
        return type(self)(self, self._others, self._names)
