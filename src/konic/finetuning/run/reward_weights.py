"""The weights of the rewards over a run: a setting is what it began with, the state what callbacks made of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from konic.finetuning.rewards.composer import KonicLLMRewardComposer, own_weights, take_weights


class RewardWeights:
    """The weights of one composer, and those with which its run began."""

    def __init__(self, composer: KonicLLMRewardComposer) -> None:
        self._composer = composer
        self._first: dict[str, float] | None = None
        self._left: dict[str, float] | None = None
        """What the last training left. Where they are others by now, the user has set them, and not a callback."""

    @property
    def current(self) -> dict[str, float]:
        """Those that count now, by name."""
        return own_weights(self._composer)

    @property
    def first(self) -> dict[str, float]:
        """Those with which the run began, by name; before it begins, those that count now."""
        return self.current if self._first is None else self._first

    def take(self, weights: Mapping[str, float]) -> None:
        """Let these count from now on."""
        take_weights(self._composer, weights)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Within it a callback may change the weights, and the run stays the same one."""
        self._first = self.first
        try:
            yield
        finally:
            self._left = self.current

    def can_continue(self, first: Mapping[str, float] | None, then: Mapping[str, float]) -> bool:
        """True if a run that began with `first`, and had `then` at a checkpoint, may continue from it.

        The weights of now are those of its beginning in a new process, and those of its end in the engine that ran it.
        """
        is_set_by_user = self.current != self._left
        own_first = self.current if is_set_by_user else self.first
        return own_first == first or self.current == then

    def restart(self) -> None:
        """Let the run begin with the weights of now."""
        self._first = None

    def resume(self, first: Mapping[str, float] | None, then: Mapping[str, float]) -> None:
        """Go on from a checkpoint of such a run."""
        self._first = None if first is None else dict(first)
        self.take(then)
