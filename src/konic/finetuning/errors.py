"""Every error that a user can cause. Each message says what happened, where, and what to do about it."""

import difflib
import inspect
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from konic.text import indented, printable, printable_lines


def is_valid_text(text: str) -> bool:
    """Return False for text with half a character, a lone surrogate, which no file or tokenizer can take."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class KonicError(Exception):
    """The base class of every error that a user can cause and fix. Its message is safe to show in a terminal.

    Args:
        lines: The lines of the message. A line break inside one of them is escaped: no text of others adds a line.
    """

    def __init__(self, *lines: object) -> None:
        super().__init__(*(printable(str(line)) for line in lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


class RedactedError(Exception):
    """Stands for an error of others, as the cause of ours: its message is the traceback of that error, made safe."""


def safe_cause(error: BaseException) -> BaseException:
    """Return what a traceback may show as a cause: the error, or what stands for it if its traceback is unsafe."""
    shown = "".join(traceback.format_exception(error))
    safe = printable_lines(shown)
    return error if safe == shown else RedactedError("\n".join(["", "", *indented(safe.split("\n"))]))


class PanicError(Exception):
    """Stands for a panic of a library written in Rust, which is no Exception."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise a panic of a library written in Rust as a PanicError of the same words."""
    try:
        yield
    except (Exception, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as panic:
        raise PanicError(str(panic)) from safe_cause(panic)


class ConfigError(KonicError, ValueError):
    """A setting is missing, misspelt, out of bounds or in conflict with another setting."""


class ModelError(KonicError):
    """A base model, tokenizer or adapter cannot be loaded or used."""


class NotOfferedError(KonicError, ImportError):
    """A name or module of konic 0.1 that is not here; the message says what to use instead."""


class DatasetError(KonicError):
    """A dataset cannot be read, or holds rows that cannot be used as prompts."""


class RewardError(KonicError):
    """A reward is missing or misnamed, raised an error, or returned something that is not a number."""


class OutputError(KonicError):
    """A folder cannot be written, or does not hold what it should hold."""


class SamplerError(KonicError):
    """A server that samples cannot be started or reached, or answers wrongly. Nothing was updated by its answer."""


class TrainingError(KonicError):
    """A number of the run violated an invariant; the weights are those from before the step."""


class ProcessLostError(TrainingError):
    """Another process of the run is gone; there is nobody to tell."""


class NotFiniteError(TrainingError):
    """A number is NaN or infinite. With on_nonfinite="skip" training drops its batch or step instead."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the known name closest to a misspelt one, or an empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def first_of(items: Sequence[object], most: int = 10) -> str:
    """Return the first items as text, separated by commas, and how many more there are: `1, 2 and 5 more`."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more


def no_attribute(owner: object, name: str, successors: Mapping[str, str]) -> AttributeError:
    """Return the error of an attribute that is not there; for one of konic 0.1 it says what to use instead.

    Raises:
        AttributeError: The attribute is a property that lacks something else: Python calls `__getattr__` for this too.
    """
    member = inspect.getattr_static(type(owner), name, None)
    if isinstance(member, property) and member.fget:
        member.fget(owner)
    hint = f" {successors[name]}" if name in successors else ""
    return AttributeError(f"{type(owner).__name__!r} object has no attribute {name!r}.{hint}", name=name, obj=owner)
