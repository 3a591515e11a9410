"""Combines the user's callbacks into one callback; every hook is written out for the type checker."""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from konic.finetuning.callbacks.console import KonicFinetuningCallback
from konic.finetuning.callbacks.hooks import BaseKonicFinetuningCallback
from konic.finetuning.callbacks.json_lines import JsonLinesCallback
from konic.finetuning.callbacks.trackers import Tracker
from konic.finetuning.errors import ConfigError, did_you_mean
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult
from konic.finetuning.system.user_code import preserved_state
from konic.output import get_logger
from konic.text import describe_error

logger = get_logger(__name__)


class CompositeCallback(BaseKonicFinetuningCallback):
    """Several callbacks as one: each hook of all of them is called, in order.

    Raises:
        ConfigError: One of the objects is not a callback.
    """

    def __init__(self, callbacks: Sequence[BaseKonicFinetuningCallback]) -> None:
        if isinstance(callbacks, str):
            raise ConfigError(f"callback={callbacks!r} is not a BaseKonicFinetuningCallback, but text.")
        for callback in callbacks:
            if not isinstance(callback, BaseKonicFinetuningCallback):
                hint = " Give an instance: add ()." if isinstance(callback, type) else ""
                raise ConfigError(f"callback: {callback!r} is not a BaseKonicFinetuningCallback.{hint}")
            _check(callback)
        self.callbacks = list(callbacks)
        if len({id(callback) for callback in self._each()}) < sum(1 for _ in self._each()):
            raise ConfigError("callback: one object is given twice, so its hooks would be called twice.")
        self.patience_seconds = math.inf
        """How long other processes wait while a callback runs here."""

    @property
    def reports_iterations(self) -> bool:
        """True if one of the callbacks does something of its own at the end of an iteration, or is the printing one."""
        return any(map(_reports_iterations, self.callbacks))

    def _each(self) -> Iterator[BaseKonicFinetuningCallback]:
        """Every callback, also of those that are composed themselves."""
        for callback in self.callbacks:
            yield from callback._each() if isinstance(callback, CompositeCallback) else (callback,)

    @contextmanager
    def reporting_errors(self) -> Iterator[None]:
        """Within the block, an error is passed to `on_train_error` of all callbacks before it is raised again."""
        try:
            yield
        except BaseException as error:
            self.on_train_error(error)
            raise

    def _all(self, call: Callable[[BaseKonicFinetuningCallback], Any]) -> list[Any]:
        """Call every callback in order. It gets copies, and what it leaves changed of the process is undone."""
        results = []
        for callback in self.callbacks:
            who, started = f"Callback {type(callback).__name__!r}", time.monotonic()
            with preserved_state(who):
                try:
                    results.append(call(callback))
                except SystemExit:
                    logger.warning("%s called sys.exit(): what is done is saved, and the process ends.", who)
                    raise
            seconds = time.monotonic() - started
            if seconds > self.patience_seconds:
                logger.warning(
                    "%s took %.0f s, and the other processes wait for at most process_timeout_seconds=%g: raise it, or "
                    "do the work outside the callback.",
                    who, seconds, self.patience_seconds,
                )  # fmt: skip
        return results

    def on_train_begin(self, config: dict[str, Any]) -> None:
        """See the base class."""
        self._all(lambda callback: callback.on_train_begin(deepcopy(config)))

    def on_iteration_begin(self, iteration: int) -> None:
        """See the base class."""
        self._all(lambda callback: callback.on_iteration_begin(iteration))

    def on_generation_begin(self, prompts: list[str]) -> None:
        """See the base class."""
        self._all(lambda callback: callback.on_generation_begin(deepcopy(prompts)))

    def on_generation_end(self, prompts: list[str], responses: list[str]) -> None:
        """See the base class."""
        self._all(lambda callback: callback.on_generation_end(deepcopy(prompts), deepcopy(responses)))

    def on_reward_computed(self, rewards: list[float], reward_breakdown: dict[str, list[float]]) -> None:
        """See the base class."""
        self._all(lambda callback: callback.on_reward_computed(deepcopy(rewards), deepcopy(reward_breakdown)))

    def on_iteration_end(self, result: FinetuningIterationResult) -> None:
        """See the base class."""
        self._all(lambda callback: callback.on_iteration_end(deepcopy(result)))

    def on_checkpoint_saved(self, path: str, iteration: int) -> None:
        """See the base class."""
        self._all(lambda callback: callback.on_checkpoint_saved(path, iteration))

    def on_train_end(self, result: FinetuningResult) -> None:
        """See the base class."""
        self._all(lambda callback: callback.on_train_end(deepcopy(result)))

    def on_train_error(self, error: BaseException) -> None:
        """Tell every callback. One that fails here is a warning: it hides neither the error nor the other callbacks."""
        for callback in self.callbacks:
            try:
                with preserved_state(who := f"Callback {type(callback).__name__!r}"):
                    callback.on_train_error(error)
            except (Exception, SystemExit) as failure:
                logger.warning("%s failed in on_train_error: %s", who, describe_error(failure))

    def should_stop_early(self, result: FinetuningIterationResult) -> bool:
        """True if any callback returns True; every callback is called.

        Raises:
            ConfigError: One returns neither True, False nor None.
        """
        answers = self._all(lambda callback: callback.should_stop_early(deepcopy(result)))
        stops = [_is_true(callback, answer) for callback, answer in zip(self.callbacks, answers, strict=True)]
        return any(stops)


class Callbacks(CompositeCallback):
    """The callbacks of a run. If none of those given reports iterations, one that prints them comes first.

    Of several that print the run's lines, the first one does, or the first whose class leaves them as they are.

    Raises:
        ConfigError: One of the objects is not a callback.
    """

    def __init__(self, given: Any) -> None:
        super().__init__(given if isinstance(given, Sequence) else [given] if given is not None else [])
        if not self.reports_iterations:
            self.callbacks.insert(0, KonicFinetuningCallback())
        printing = [each for each in self._each() if isinstance(each, KonicFinetuningCallback)]
        spoken = [each for each in printing if each.verbose]
        plain = (each for each in spoken if type(each).on_iteration_end is KonicFinetuningCallback.on_iteration_end)
        first = next(plain, spoken[0] if spoken else None)
        for callback in printing:
            callback.is_second = callback is not first


def _is_true(callback: BaseKonicFinetuningCallback, answer: Any) -> bool:
    is_bool = str(getattr(answer, "dtype", "")).endswith("bool") and answer.ndim == 0  # of NumPy or torch
    if answer is None or isinstance(answer, bool) or is_bool:
        return bool(answer)
    raise ConfigError(
        f"Callback {type(callback).__name__}.should_stop_early returned a value of type {type(answer).__name__}: it "
        "must return True or False."
    )


def _check(callback: BaseKonicFinetuningCallback) -> None:
    """Raise ConfigError if a callback's hooks would not run, or if it was not set up; warn about names close to hooks.

    A method whose name is only close may be a helper of the user's own.
    """
    kind = type(callback).__name__
    for name in dir(type(callback)):
        if name not in _HOOKS and name.startswith(("on_", "should_")) and (hint := did_you_mean(name, _HOOKS)):
            logger.warning("Callback %s.%s is not a hook, so training does not call it.%s", kind, name, hint)
    for name in _HOOKS:
        hook = getattr(callback, name)
        if inspect.iscoroutinefunction(hook) or inspect.isasyncgenfunction(hook) or inspect.isgeneratorfunction(hook):
            raise ConfigError(
                f"Callback {kind}.{name} would never run: make it a plain method, not async or with yield."
            )
        _check_parameters(f"{kind}.{name}", hook, _HOOKS[name])
    set_by_init = next((name for base, name in _SET_BY_INIT.items() if isinstance(callback, base)), None)
    if set_by_init is not None and set_by_init not in vars(callback):
        raise ConfigError(f"Callback {kind}: its __init__ must call super().__init__().")


def _check_parameters(name: str, hook: Callable[..., Any], asked: Callable[..., Any]) -> None:
    """Raise ConfigError unless a hook takes what the base class's hook `asked` takes."""
    wanted = list(inspect.signature(asked).parameters)[1:]  # without self
    try:
        signature = inspect.signature(hook)
    except (TypeError, ValueError):  # no signature can be read, as of a function written in C
        return
    try:
        signature.bind(*wanted)
    except TypeError as error:
        raise ConfigError(
            f"Callback {name}{signature} cannot be called as training calls it: {error}. Write "
            f"{name.rpartition('.')[2]}(self, {', '.join(wanted)})."
        ) from None


_SET_BY_INIT = {KonicFinetuningCallback: "is_second", Tracker: "_has_warned", JsonLinesCallback: "_stream"}
"""By class, an attribute that an instance has once the `__init__` of the class has run."""
_HOOKS = {name: hook for name, hook in vars(BaseKonicFinetuningCallback).items() if not name.startswith("_")}


def _reports_iterations(callback: BaseKonicFinetuningCallback) -> bool:
    if isinstance(callback, CompositeCallback):
        return callback.reports_iterations
    is_own = getattr(callback.on_iteration_end, "__func__", None) is not BaseKonicFinetuningCallback.on_iteration_end
    return is_own and not isinstance(callback, Tracker)
