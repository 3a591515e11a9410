"""Events as lines of strict JSON: what is not JSON becomes it, warnings are events, and no secret is shown."""

import io
import json
import logging
import sys

import pytest
from test_callbacks import CONFIG, finished, iteration

from konic.finetuning.callbacks.composite import Callbacks
from konic.finetuning.callbacks.json_lines import JsonLinesCallback
from konic.finetuning.errors import ConfigError

NAN = float("nan")


class Counts(io.StringIO):
    flushes = 0

    def flush(self):
        self.flushes += 1


def events_of(stream):
    return [json.loads(line, parse_constant=lambda name: 1 / 0) for line in stream.getvalue().splitlines()]


def test_each_event_is_a_flushed_line_and_warnings_are_events_until_the_end():
    stream = Counts()
    callbacks = Callbacks([JsonLinesCallback(stream)])
    assert len(callbacks.callbacks) == 1  # nothing else prints
    callbacks.on_train_begin(CONFIG | {"odd": {1, 2}, "deep": [{"x": (NAN, float("inf"))}], "api_key": "plain7Key"})
    logging.getLogger("konic.finetuning.trainer").warning("Iteration %d: a finding\nof two lines", 3)
    callbacks.on_iteration_end(iteration(reward_mean=NAN, reward_breakdown={"a": NAN}, checks=("length",)))
    callbacks.on_checkpoint_saved("runs/x/checkpoint-1", 1)
    callbacks.on_train_end(finished())
    logging.getLogger("konic.finetuning.trainer").warning("after the end")
    events = events_of(stream)
    assert stream.flushes == len(events) == 5
    assert [event["event"] for event in events] == ["begin", "warning", "iteration", "checkpoint", "end"]
    assert events[0]["settings"]["deep"] == [{"x": [None, None]}] and events[0]["settings"]["api_key"] == "***"
    assert events[1]["message"].startswith("Iteration 3: a finding\nof two lines")
    shown = [events[2][name] for name in ("reward_mean", "reward_breakdown", "checks")]
    assert shown == [None, {"a": None}, ["length"]]
    assert events[3] == {"event": "checkpoint", "iteration": 1, "path": "runs/x/checkpoint-1"}
    assert (events[4]["best_iteration"], events[4]["held_out"]) == (47, None)


def test_an_error_is_the_last_event_and_a_reader_that_is_gone_costs_nothing(capsys):
    callback = JsonLinesCallback()
    callback.on_train_begin(CONFIG)
    callback.on_train_error(ValueError("why"))
    assert [event["event"] for event in map(json.loads, capsys.readouterr().out.splitlines())] == ["begin", "error"]
    stream = io.StringIO()
    stream.close()
    JsonLinesCallback(stream).on_iteration_end(iteration())
    assert sys.stdout is not stream


def test_a_stream_that_cannot_be_written_to_is_an_error_at_once():
    with pytest.raises(ConfigError, match=r"stream='run.jsonl'.*open text file, such as open\('run.jsonl', 'w'\)"):
        JsonLinesCallback("run.jsonl")
