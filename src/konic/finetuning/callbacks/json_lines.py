"""Events of a run -> one JSON object per line, for programs that follow a run."""

import json
import logging
import sys
from typing import Any, TextIO

from konic.finetuning.callbacks.hooks import BaseKonicFinetuningCallback
from konic.finetuning.errors import ConfigError
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult
from konic.output import Tolerant, get_logger
from konic.text import describe_error, redact, redact_all


class JsonLinesCallback(BaseKonicFinetuningCallback):
    """Writes each event of a run as a line of strict JSON, and flushes it; it prints nothing else.

    Args:
        stream: Where to write; None is standard output.

    Raises:
        ConfigError: One cannot write to `stream`.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        if stream is not None and not callable(getattr(stream, "write", None)):
            raise ConfigError(
                f"JsonLinesCallback(stream={stream!r}): it must be an open text file, such as open('run.jsonl', 'w'), "
                "or None for standard output."
            )
        self._stream = stream
        self._handler = _WarningEvents(self)

    def on_train_begin(self, config: dict[str, Any]) -> None:
        """Write the settings; from here to the end, warnings of konic are events too."""
        self.write("begin", settings=config)
        get_logger("konic").addHandler(self._handler)

    def on_iteration_end(self, result: FinetuningIterationResult) -> None:
        """Write every metric."""
        self.write("iteration", **result.to_dict())

    def on_checkpoint_saved(self, path: str, iteration: int) -> None:
        """Write where the checkpoint is."""
        self.write("checkpoint", iteration=iteration, path=path)

    def on_train_end(self, result: FinetuningResult) -> None:
        """Write the result without its history, which the iterations were."""
        gain = result.held_out_gain
        held_out = None
        if gain is not None and result.before is not None and result.after is not None:
            means = {"before": result.before.reward_mean, "after": result.after.reward_mean}
            held_out = means | {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
        values = {name: value for name, value in result.to_dict().items() if name != "history"}
        self.write("end", **values, held_out=held_out)
        get_logger("konic").removeHandler(self._handler)

    def on_train_error(self, error: BaseException) -> None:
        """Write the error that ends the run."""
        self.write("error", message=describe_error(error))
        get_logger("konic").removeHandler(self._handler)

    def write(self, event: str, **values: Any) -> None:
        """Write one line."""
        stream = Tolerant(sys.stdout if self._stream is None else self._stream)
        stream.write(json.dumps({"event": event} | _strict(redact_all(values)), allow_nan=False) + "\n")
        stream.flush()


class _WarningEvents(logging.Handler):
    def __init__(self, events: JsonLinesCallback) -> None:
        super().__init__(logging.WARNING)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        self._events.write("warning", message=redact(record.getMessage()))


def _strict(value: Any) -> Any:
    """The value as JSON has it: null for a number that is not finite, text for what is neither number nor text."""
    if isinstance(value, dict):
        return {str(name): _strict(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(part) for part in value]
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    return value if value is None or isinstance(value, str | int) else str(value)
