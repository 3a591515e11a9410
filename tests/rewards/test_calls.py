import asyncio
import concurrent.futures
import functools
import inspect
import math
import pickle
import signal
import statistics
import threading
import time
import urllib.request
from fractions import Fraction

import numpy as np
import pytest
import torch

from konic.finetuning.data.samples import samples_from_texts
from konic.finetuning.errors import RewardError
from konic.finetuning.rewards import calls as reward_calls
from konic.finetuning.rewards.calls import call_reward
from konic.finetuning.rewards.composer import KonicLLMRewardComposer
from konic.finetuning.rewards.marks import llm_reward
from konic.finetuning.rewards.outcomes import (
    Fault,
    NotANumberError,
    Reward,
    number,
    read_parts,
    shorten,
    timeout_fault,
    users_traceback,
)
from konic.finetuning.rewards.signatures import detect_shape, requested_columns, require_a_response

PROMPTS, RESPONSES = ["p1", "p2", "p3"], ["a", "bb", "cccc"]
LABELS = [100, 200, 300]
CHATS = [[{"role": "system", "content": "Brief."}, {"role": "user", "content": p}] for p in PROMPTS]


def worth(prompt, response):
    """Of both texts, so that neither can be lost, nor one taken for the other."""
    return 10 * int(prompt.removeprefix("p")) + len(response)


def outcomes_of(function, timeout=None, **columns):
    reward = Reward("kind", function, detect_shape(function))
    return list(call_reward(reward, samples_from_texts(PROMPTS, RESPONSES, columns), timeout))


def values_of(function, timeout=None, **columns):
    return [outcome["kind"] for outcome in outcomes_of(function, timeout, **columns)]


def outcome_of(value):
    """Of a reward of single samples that returns the value."""
    (outcome,) = call_reward(Reward("kind", lambda prompt, response: value), samples_from_texts(["p"], ["r"], {}))
    return outcome


def batch_outcomes(value):
    """Of a reward of three samples at once that returns the value."""
    return list(
        call_reward(
            Reward("kind", lambda prompts, responses: value, "batch"), samples_from_texts(PROMPTS, RESPONSES, {})
        )
    )


# --- shapes ---


def sample(prompt, response):
    return worth(prompt, response)


def sample_of_any_names(question, answer, /):
    return worth(question, answer)


def sample_of_all(*texts):
    return worth(*texts)


async def async_sample(prompt, response):
    await asyncio.sleep(0)
    return worth(prompt, response)


def promised_sample(prompt, response):
    return async_sample(prompt, response)


class Later:
    """An awaitable that is no coroutine."""

    def __init__(self, value):
        self.value = value

    def __await__(self):
        yield from asyncio.sleep(0).__await__()
        return self.value


def later_sample(prompt, response):
    return Later(worth(prompt, response))


def batch(prompts, responses):
    assert type(prompts) is type(responses) is list
    return [*map(worth, prompts, responses)]


def batch_named_by_its_prompts(prompts, answers):
    return [*map(worth, prompts, answers)]


def batch_named_by_its_responses(questions, responses):
    return [*map(worth, questions, responses)]


async def async_batch(prompts, responses):
    await asyncio.sleep(0)
    return batch(prompts, responses)


def promised_batch(prompts, responses):
    return async_batch(prompts, responses)


def later_batch(prompts, responses):
    return Later(batch(prompts, responses))


def trl(prompts, completions):
    return batch(prompts, completions)


def trl_with_all(prompts, completions, **kwargs):
    assert kwargs == {}
    return batch(prompts, completions)


def trl_the_other_way_round(completions, prompts):
    return batch(prompts, completions)


def trl_of_keywords(*, completions, prompts):
    return batch(prompts, completions)


async def async_trl(completions, **kwargs):
    await asyncio.sleep(0)
    return batch(kwargs["prompts"], completions)


def promised_trl(prompts, completions):
    return async_trl(prompts=prompts, completions=completions)


class Grader:
    """Rewards that are methods or the object itself."""

    def __call__(self, prompt, response):
        return worth(prompt, response)

    def of_all(self, prompts, responses):
        return batch(prompts, responses)

    async def in_time(self, prompt, response):
        return worth(prompt, response)


SHAPES = [
    (sample, "sample"),
    (sample_of_any_names, "sample"),
    (sample_of_all, "sample"),
    (async_sample, "sample"),
    (promised_sample, "sample"),
    (later_sample, "sample"),
    (batch, "batch"),
    (batch_named_by_its_prompts, "batch"),
    (batch_named_by_its_responses, "batch"),
    (async_batch, "batch"),
    (promised_batch, "batch"),
    (later_batch, "batch"),
    (trl, "completions"),
    (trl_with_all, "completions"),
    (trl_the_other_way_round, "completions"),
    (trl_of_keywords, "completions"),
    (async_trl, "completions"),
    (promised_trl, "completions"),
    (Grader(), "sample"),
    (Grader().of_all, "batch"),
    (Grader().in_time, "sample"),
    (functools.partial(sample), "sample"),
    (functools.partial(async_batch), "batch"),
]


@pytest.mark.parametrize(("function", "shape"), SHAPES)
def test_every_shape_is_told_by_its_parameters_and_called_as_it_wants(function, shape):
    assert detect_shape(function) == shape
    assert outcomes_of(function) == [{"kind": 11}, {"kind": 22}, {"kind": 34}]


@pytest.mark.parametrize(("function", "shape"), SHAPES)
def test_every_shape_works_in_a_running_event_loop(function, shape):
    async def notebook():
        return values_of(function)

    assert asyncio.run(notebook()) == [11, 22, 34]


@pytest.mark.parametrize(("function", "shape"), SHAPES)
def test_no_shape_minds_a_batch_of_none(function, shape):
    assert list(call_reward(Reward("kind", function, shape), samples_from_texts([], [], {}))) == []


def test_trls_completions_may_come_without_prompts():
    def alone(completions):
        return [len(completion) for completion in completions]

    def with_all(completions, **kwargs):
        assert kwargs == {"prompts": PROMPTS}
        return [len(completion) for completion in completions]

    assert values_of(alone) == values_of(with_all) == [1, 2, 4]


def refused_one(x):
    return 1.0


def refused_none():
    return 1.0


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (refused_one, "'refused_one' takes (x)."),
        (refused_none, "'refused_none' takes ()."),
        (max, "'max' takes"),
    ],
)
def test_a_function_that_takes_neither_is_refused_with_what_it_takes(function, told):
    with pytest.raises(RewardError) as error:
        detect_shape(function)
    assert told in str(error.value)
    assert "takes (prompt, response), (prompts, responses) or TRL's (prompts, completions, **columns)" in str(
        error.value
    )


def test_a_batch_reward_may_change_the_lists_it_gets():
    def greedy(prompts, responses, label):
        values = batch(prompts, responses)
        prompts.clear(), responses.clear(), label.clear()
        return values

    def greedy_trl(prompts, completions, label):
        return greedy(prompts, completions, label)

    labels = list(LABELS)
    for function in (greedy, greedy_trl):
        prompts, responses = list(PROMPTS), list(RESPONSES)
        reward = Reward("kind", function, detect_shape(function))
        assert len([*call_reward(reward, samples_from_texts(prompts, responses, {"label": labels}))]) == 3
        assert (prompts, responses, labels) == (PROMPTS, RESPONSES, LABELS)


# --- columns ---


def sample_column(prompt, response, label):
    return worth(prompt, response) + label


async def async_sample_column(prompt, response, *, label):
    return worth(prompt, response) + label


def sample_all_columns(prompt, response, **columns):
    assert columns.keys() == {"label", "other"}
    return worth(prompt, response) + columns["label"]


def batch_column(prompts, responses, label):
    return [value + more for value, more in zip(batch(prompts, responses), label, strict=True)]


async def async_batch_all_columns(prompts, responses, **columns):
    assert columns.keys() == {"label", "other"}
    return batch_column(prompts, responses, columns["label"])


def trl_column(prompts, completions, label):
    return batch_column(prompts, completions, label)


def trl_column_without_prompts(completions, label, absent=10):
    return [absent * (n + 1) + len(text) + more for n, (text, more) in enumerate(zip(completions, label, strict=True))]


def trl_all_columns(completions, **kwargs):
    assert kwargs.keys() == {"prompts", "label", "other"}
    return batch_column(kwargs["prompts"], completions, kwargs["label"])


def trl_column_and_the_rest(prompts, completions, label, **kwargs):
    assert kwargs == {"other": ["x", "y", "z"]}
    return batch_column(prompts, completions, label)


WITH_COLUMNS = [
    (sample_column, ["label"]),
    (async_sample_column, ["label"]),
    (sample_all_columns, ["label", "other"]),
    (batch_column, ["label"]),
    (async_batch_all_columns, ["label", "other"]),
    (trl_column, ["label"]),
    (trl_column_without_prompts, ["label"]),
    (trl_all_columns, ["label", "other"]),
    (trl_column_and_the_rest, ["label", "other"]),
]


@pytest.mark.parametrize(("function", "wanted"), WITH_COLUMNS)
def test_every_shape_gets_the_columns_it_asks_for(function, wanted):
    columns = {"label": LABELS, "other": ["x", "y", "z"]}
    assert requested_columns(Reward("kind", function, detect_shape(function)), columns) == wanted
    assert values_of(function, **columns) == [111, 222, 334]


@pytest.mark.parametrize("function", [sample_column, async_sample_column, batch_column, trl_column])
def test_a_column_that_is_not_there_is_reported(function):
    with pytest.raises(RewardError) as error:
        outcomes_of(function, labels=LABELS, other=LABELS)
    told = "Reward 'kind' asks for the column 'label', which the dataset does not have. Did you mean 'labels'?"
    assert str(error.value) == f"{told} Its other columns: labels, other."


# --- chats ---


def test_trl_functions_get_messages_and_one_assistant_message_each_of_chats():
    seen = []

    def judge(prompts, completions, **kwargs):
        seen.append((prompts, completions, kwargs))
        return [len(completion[0]["content"]) for completion in completions]

    assert values_of(judge, messages=CHATS, label=LABELS) == [1, 2, 4]
    assert seen == [
        (
            CHATS,
            [[{"role": "assistant", "content": response}] for response in RESPONSES],
            {"messages": CHATS, "label": LABELS},
        )
    ]
    assert seen[0][0][0] is not CHATS[0]


def test_trl_functions_without_prompts_get_chats_too():
    def judge(completions):
        assert all(message["role"] == "assistant" for (message,) in completions)
        return [len(message["content"]) for (message,) in completions]

    assert values_of(judge, messages=CHATS) == [1, 2, 4]


def test_trl_functions_get_plain_texts_where_not_every_row_is_a_chat():
    assert values_of(trl, messages=[CHATS[0], None, CHATS[2]]) == [11, 22, 34]


@pytest.mark.parametrize("function", [sample, async_sample, batch, async_batch])
def test_other_shapes_get_the_texts_of_chats(function):
    assert values_of(function, messages=CHATS) == [11, 22, 34]


# --- async rewards ---


def test_async_samples_run_together_and_keep_their_order():
    running = most = 0

    async def slow(prompt, response):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.2 + 0.01 * (16 - int(prompt)))  # the last is done first
        running -= 1
        return int(prompt)

    began = time.monotonic()
    outcomes = list(call_reward(Reward("kind", slow), samples_from_texts([str(n) for n in range(16)], ["r"] * 16, {})))
    assert time.monotonic() - began < 1.5
    assert most == 16
    assert [outcome["kind"] for outcome in outcomes] == list(range(16))


async def never_on_p2(prompt, response):
    await asyncio.sleep(60 if prompt == "p2" else 0)
    return worth(prompt, response)


def test_the_timeout_of_an_async_reward_is_each_samples_own():
    first, second, third = outcomes_of(never_on_p2, timeout=0.1)
    assert (first, third) == ({"kind": 11}, {"kind": 34})
    assert second == Fault("Reward 'kind'", "took longer than reward_timeout_seconds=0.1 and was stopped.")
    assert second == timeout_fault(Reward("kind", never_on_p2), 0.1)


def test_a_stopped_async_reward_may_tidy_up():
    tidied = []

    async def careful(prompt, response):
        try:
            await asyncio.sleep(60)
        finally:
            tidied.append(prompt)

    assert all(isinstance(outcome, Fault) for outcome in outcomes_of(careful, timeout=0.05))
    assert tidied == PROMPTS


async def raises_its_own(prompt, response):
    raise TimeoutError("the judge is away")


async def waits_for_its_own(prompt, response):
    await asyncio.wait_for(asyncio.sleep(60), 0.01)


@pytest.mark.parametrize("timeout", [None, 30])
@pytest.mark.parametrize(
    ("function", "what"),
    [(raises_its_own, "raised TimeoutError: the judge is away"), (waits_for_its_own, "raised TimeoutError")],
)
def test_a_users_own_timeout_stays_one(function, what, timeout):
    outcomes = outcomes_of(function, timeout=timeout)
    assert [outcome.what for outcome in outcomes] == [what] * 3
    assert all(isinstance(outcome.cause, TimeoutError) for outcome in outcomes)


def test_an_async_fault_is_its_own_samples():
    async def fragile(prompt, response):
        await asyncio.sleep(0)
        return 1 / (len(response) - 2)

    first, second, third = outcomes_of(fragile)
    assert (first, third) == ({"kind": -1}, {"kind": 0.5})
    assert second.what == "raised ZeroDivisionError: division by zero"


def test_a_cancelled_async_reward_is_a_fault():
    async def cancelled(prompt, response):
        raise asyncio.CancelledError

    assert [outcome.what for outcome in outcomes_of(cancelled)] == ["raised CancelledError"] * 3


@pytest.mark.parametrize("make", [lambda: asyncio.Semaphore(1), asyncio.Lock])
def test_what_an_async_reward_keeps_works_in_every_batch(make):
    gate, inside, most, loops = make(), 0, 0, set()

    async def guarded(prompt, response):
        nonlocal inside, most
        async with gate:
            inside += 1
            most = max(most, inside)
            loops.add(asyncio.get_running_loop())
            await asyncio.sleep(0.01)
            inside -= 1
        return worth(prompt, response)

    async def guarded_batch(prompts, responses):
        return [await guarded(*texts) for texts in zip(prompts, responses, strict=True)]

    for function in (guarded, guarded, guarded_batch, lambda prompt, response: guarded(prompt, response)):
        assert values_of(function) == [11, 22, 34]

    async def notebook():
        return values_of(guarded)

    assert asyncio.run(notebook()) == [11, 22, 34]
    assert most == 1
    assert len(loops) == 1


def test_an_interrupt_ends_the_wait_and_cancels_what_was_awaited():
    ended = threading.Event()

    async def endless(prompt, response):
        try:
            await asyncio.sleep(0.1)
            if prompt == "p1":
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.set()
            raise

    with pytest.raises(KeyboardInterrupt):
        outcomes_of(endless)
    assert ended.wait(10)
    assert values_of(async_sample) == [11, 22, 34]


# --- what counts as a value ---


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, {}),
        ({}, {}),
        ({"a": None}, {}),
        (True, {"kind": 1.0}),
        (False, {"kind": 0.0}),
        (3, {"kind": 3.0}),
        (-0.5, {"kind": -0.5}),
        (Fraction(1, 4), {"kind": 0.25}),
        (np.float16(0.5), {"kind": 0.5}),
        (np.float64(0.5), {"kind": 0.5}),
        (np.int8(-3), {"kind": -3.0}),
        (np.bool_(True), {"kind": 1.0}),
        (np.array(0.25), {"kind": 0.25}),
        (np.array([0.25]), {"kind": 0.25}),
        (np.array([[True]]), {"kind": 1.0}),
        (torch.tensor(0.25), {"kind": 0.25}),
        (torch.tensor([[2]]), {"kind": 2.0}),
        (torch.tensor([0.5], dtype=torch.bfloat16, requires_grad=True), {"kind": 0.5}),
        ({"a": 1, "b": None, "c": np.array([2])}, {"kind.a": 1.0, "kind.c": 2.0}),
        ({"dotted.key": 1, 2: 3}, {"kind.dotted.key": 1.0, "kind.2": 3.0}),
    ],
)
def test_numbers_dicts_and_none_are_parts(value, expected):
    for outcome in (outcome_of(value), read_parts("kind", value)):
        assert outcome == expected
        assert all(type(part) is float for part in outcome.values())


NOT_NUMBERS = [
    "0.5",
    b"1",
    [1.0],
    (1.0, 2.0),
    [],
    1j,
    np.complex64(1),
    np.array([1.0, 2.0]),
    np.array([]),
    np.array("x"),
    np.array(None),
    torch.tensor([1.0, 2.0]),
    torch.tensor([]),
    torch.tensor(1j),
    int,
    {1.0},
]
NOT_FINITE = [
    math.nan,
    math.inf,
    -math.inf,
    np.float32("nan"),
    torch.tensor([math.inf]),
    pytest.param(10**400, id="past every float"),
    pytest.param(-(10**400), id="below every float"),
    pytest.param(Fraction(10**400), id="a fraction past every float"),
]


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_what_is_not_a_number_is_a_fault_that_shows_it(value):
    what = f"returned {value!r}, not a number."
    assert outcome_of(value) == Fault("Reward 'kind'", what)
    assert outcome_of({"fine": 1, "key": value}) == Fault("Reward 'kind.key'", what)
    assert batch_outcomes([1, value, 2]) == [{"kind": 1}, Fault("Reward 'kind'", what), {"kind": 2}]


@pytest.mark.parametrize("value", NOT_FINITE)
def test_what_is_not_finite_is_a_fault_that_shows_it(value):
    what = f"returned {shorten(value)}, not a finite number."
    assert outcome_of(value) == Fault("Reward 'kind'", what)
    assert outcome_of({"fine": 1, "key": value}) == Fault("Reward 'kind.key'", what)
    assert batch_outcomes([1, value, 2]) == [{"kind": 1}, Fault("Reward 'kind'", what), {"kind": 2}]


def test_a_none_is_no_number_and_an_error_knows_its_key():
    with pytest.raises(NotANumberError, match=r"returned None, not a number\."):
        number(None)
    with pytest.raises(NotANumberError) as error:
        read_parts("kind", {"fine": 1.0, "odd": "x"})
    assert error.value.key == "odd"


def test_an_inner_dict_is_no_number():
    assert outcome_of({"a": {"b": 1}}) == Fault("Reward 'kind.a'", "returned {'b': 1}, not a number.")


def test_a_value_whose_repr_fails_is_a_fault():
    class Shy:
        def __repr__(self):
            raise LookupError("no words")

    assert outcome_of(Shy()).what == "returned a Shy that cannot be shown, not a number."


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 2.0, 3.0],
        (1, 2, 3),
        range(1, 4),
        np.array([1.0, 2.0, 3.0]),
        np.array([[1], [2], [3]]),
        torch.tensor([1.0, 2.0, 3.0]),
        torch.tensor([1, 2, 3]),
        torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True),
        [np.float32(1), torch.tensor(2), Fraction(3)],
    ],
)
def test_a_batch_reward_may_return_any_sequence_array_or_tensor(values):
    assert batch_outcomes(values) == [{"kind": 1}, {"kind": 2}, {"kind": 3}]


def test_a_batch_rewards_values_may_be_none_and_dicts():
    outcomes = batch_outcomes([None, {"a": 1, "b": None}, 3])
    assert outcomes == [{}, {"kind.a": 1}, {"kind": 3}]


@pytest.mark.parametrize(
    "value",
    [None, 1.0, "abc", b"abc", {"a": 1, "b": 2, "c": 3}, {1, 2, 3}, np.array(1.0), torch.tensor(1.0), iter([1, 2, 3])],
)
def test_what_a_batch_reward_returns_must_be_a_list_of_values(value):
    what = f"returned {value!r}, not a list with a value for each of 3 responses."
    assert batch_outcomes(value) == [Fault("Reward 'kind'", what)] * 3


def test_a_generator_is_no_list_of_values():
    def generated(prompts, responses):
        yield from batch(prompts, responses)

    for outcome in outcomes_of(generated):
        assert outcome.what.startswith("returned <generator object")
        assert outcome.what.endswith("not a list with a value for each of 3 responses.")


@pytest.mark.parametrize(
    ("values", "count"), [([], 0), ([1.0, 2.0], 2), ((1, 2, 3, 4), 4), (np.ones((1, 3)), 1), (torch.ones(5), 5)]
)
def test_a_batch_reward_must_return_a_value_per_response(values, count):
    assert batch_outcomes(values) == [Fault("Reward 'kind'", f"returned {count} values for 3 responses.")] * 3


@pytest.mark.parametrize("values", [np.ones((3, 2)), torch.ones(3, 2), [[1.0, 2.0]] * 3])
def test_rows_of_several_numbers_are_no_values(values):
    for outcome in batch_outcomes(values):
        assert outcome.who == "Reward 'kind'"
        assert outcome.what == f"returned {values[0]!r}, not a number."


# --- faults ---


def helper():
    raise ValueError("odd response")


def failing_sample(prompt, response):
    return helper()


async def failing_async_sample(prompt, response):
    await asyncio.sleep(0)
    return helper()


def failing_promised_sample(prompt, response):
    return failing_async_sample(prompt, response)


def failing_batch(prompts, responses):
    return helper()


async def failing_async_batch(prompts, responses):
    await asyncio.sleep(0)
    return helper()


def failing_trl(completions, **kwargs):
    return helper()


FAILING = [
    failing_sample,
    failing_async_sample,
    failing_promised_sample,
    failing_batch,
    failing_async_batch,
    failing_trl,
]


@pytest.mark.parametrize("function", FAILING)
def test_a_fault_holds_the_users_frames_and_lines_and_none_of_ours(function):
    outcomes = outcomes_of(function)
    assert len(outcomes) == 3
    for fault in outcomes:
        assert (fault.who, fault.what) == ("Reward 'kind'", "raised ValueError: odd response")
        assert isinstance(fault.cause, ValueError)
        line = inspect.getsourcelines(helper)[1] + 1
        assert f'File "{__file__}", line {line}, in helper\n    raise ValueError("odd response")' in fault.traceback
        assert function.__name__.replace("promised", "async") in fault.traceback
        assert fault.traceback.endswith("ValueError: odd response")
        files = (reward_calls.__file__, asyncio.__path__[0], concurrent.futures.__path__[0], "konic/finetuning")
        assert not any(file in fault.traceback for file in files)


async def failing_with_a_cause(prompt, response):
    try:
        await asyncio.wait_for(asyncio.sleep(60), 0.01)
    except TimeoutError as error:
        raise RuntimeError("no judgement") from error


def failing_while_it_handles(prompt, response):
    try:
        return {}["label"]
    except KeyError:
        return helper()


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (failing_with_a_cause, ("TimeoutError", "was the direct cause", "RuntimeError: no judgement", "wait_for(")),
        (failing_while_it_handles, ("KeyError: 'label'", "During handling", "ValueError: odd", 'return {}["label"]')),
    ],
)
def test_a_faults_traceback_tells_what_led_to_it(function, told):
    fault = outcomes_of(function)[0]
    positions = [fault.traceback.rindex(part) for part in told[:3]]
    assert positions == sorted(positions)
    assert told[3] in fault.traceback
    assert function.__name__ in fault.traceback
    assert not any(file in fault.traceback for file in (reward_calls.__file__, asyncio.__path__[0]))


def test_a_faults_traceback_leaves_out_what_libraries_do_inside():
    def asks(prompt, response):
        return urllib.request.urlopen("http://127.0.0.1:9/")  # nothing listens there

    told = outcomes_of(asks)[0].traceback
    assert "in asks" in told and "Connection refused" in told.splitlines()[-1]
    assert urllib.request.__file__ not in told and "During handling" not in told
    assert len(told.splitlines()) <= 5

    names = {}
    exec(compile("def of_a_library(prompt, response): raise KeyError(prompt)", statistics.__file__, "exec"), names)
    assert "in of_a_library" in outcomes_of(names["of_a_library"])[0].traceback


def ping(depth):
    return pong(depth + 1)


def pong(depth):
    return ping(depth + 1)


def test_the_end_of_a_long_traceback_is_kept():
    def deep(prompt, response):
        return ping(0)

    told = outcomes_of(deep)[0].traceback
    assert told.startswith("… ")
    assert len(told) == 4002
    assert "in ping" in told and "in pong" in told
    assert "RecursionError: maximum recursion depth exceeded" in told.splitlines()[-1]


@pytest.mark.parametrize(("length", "is_cut"), [(4000, False), (4001, True)])
def test_a_traceback_of_4000_characters_is_whole(length, is_cut):
    def told(size):
        return users_traceback(ValueError("x" * size))

    empty = len(told(1)) - 1
    text = told(length - empty)
    assert text.startswith("… ") is is_cut
    assert len(text) == (4002 if is_cut else length)


def test_a_reward_that_takes_no_response_is_said():
    def lacking(prompt):
        return 1.0

    with pytest.raises(RewardError, match="Reward 'kind' takes no response: its parameters are prompt"):
        list(call_reward(Reward("kind", lacking), samples_from_texts(PROMPTS, RESPONSES, {})))


@pytest.mark.parametrize("error", [SystemExit(3), SystemExit(), NotImplementedError(), StopIteration(), ValueError("")])
def test_whatever_a_reward_raises_is_a_fault_of_each_sample_it_was_called_with(error):
    def fails_on_p2(prompt, response):
        if prompt == "p2":
            raise error
        return worth(prompt, response)

    def fails(prompts, responses):
        raise error

    what = f"raised {type(error).__name__}" + (f": {error}" if str(error) else "")
    first, second, third = outcomes_of(fails_on_p2)
    assert (first, second.what, third) == ({"kind": 11}, what, {"kind": 34})
    assert second.cause is error
    assert [(fault.what, fault.cause) for fault in outcomes_of(fails)] == [(what, error)] * 3


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "function",
    [
        lambda prompt, response: interrupted(),
        lambda prompts, responses: interrupted(),
        lambda completions: interrupted(),
    ],
    ids=["sample", "batch", "completions"],
)
def test_an_interrupt_in_a_reward_passes_through(function):
    with pytest.raises(KeyboardInterrupt):
        outcomes_of(function)


def test_a_models_fault_names_it_as_one():
    def scores(prompts, responses):
        return [1.0, "x", None]

    reward = Reward("judge", scores, "batch", is_model=True)
    assert reward.who == "Reward model 'judge'"
    assert Reward("kind", sample).who == "Reward 'kind'"
    first, second, third = call_reward(reward, samples_from_texts(PROMPTS, RESPONSES, {}))
    assert (first, third) == ({"judge": 1}, {})
    assert second == Fault("Reward model 'judge'", "returned 'x', not a number.")


@pytest.mark.parametrize("cause", [None, ValueError("x"), RuntimeError(threading.Lock())])
def test_a_fault_survives_pickling_without_its_cause(cause):
    fault = Fault("Reward 'kind'", "raised ValueError: x", "Traceback …", cause)
    back = pickle.loads(pickle.dumps(fault))
    assert back == fault
    assert (back.who, back.what, back.traceback, back.cause) == (fault.who, fault.what, fault.traceback, None)
    assert fault.cause is cause


def test_a_real_fault_survives_pickling():
    fault = outcomes_of(failing_async_sample)[0]
    assert pickle.loads(pickle.dumps(fault)) == fault
    assert fault != Fault(fault.who, fault.what, "elsewhere")


def test_the_error_of_a_fault_tells_reward_sample_and_place():
    cause = ValueError("x")
    fault = Fault("Reward 'kind'", "raised ValueError: x", "Traceback:\n  here", cause)
    error = fault.error("the\nprompt", "the 'response'")
    assert isinstance(error, RewardError)
    assert str(error).splitlines() == [
        "Reward 'kind' raised ValueError: x",
        "  prompt:   'the\\nprompt'",
        "  response: \"the 'response'\"",
        "  Traceback:",
        "    here",
    ]
    assert error.__cause__ is cause


def test_the_error_of_a_fault_without_a_traceback_ends_with_the_response():
    error = Fault("Reward 'kind'", "returned None.").error("p", "r")
    assert str(error) == "Reward 'kind' returned None.\n  prompt:   'p'\n  response: 'r'"
    assert error.__cause__ is None


def test_long_texts_are_shortened_in_an_error():
    text = str(Fault("Reward 'kind'", "did.").error("p" * 5000, "r" * 200))
    assert f"prompt:   '{'p' * 200}' … (5000 characters)\n" in text
    assert text.endswith(f"response: '{'r' * 200}'")


def test_long_values_are_shortened_too():
    assert shorten([1] * 1000) == repr([1] * 1000)[:400] + " …"
    assert shorten(["x" * 396]) == repr(["x" * 396])
    assert shorten("x" * 201) == f"'{'x' * 200}' … (201 characters)"


# --- laziness ---


def test_the_outcomes_of_single_samples_come_as_they_are_made():
    called = []

    def counted(prompt, response):
        called.append(prompt)
        return 1 / (len(response) - 2)

    outcomes = call_reward(Reward("kind", counted), samples_from_texts(PROMPTS, RESPONSES, {}))
    assert called == []
    assert next(outcomes) == {"kind": -1}
    assert called == ["p1"]
    assert isinstance(next(outcomes), Fault)
    assert called == ["p1", "p2"]
    assert next(outcomes) == {"kind": 0.5}
    assert list(outcomes) == []


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt("no")])
def test_an_async_reward_that_exits_is_a_fault_and_the_loop_lives_on(error):
    async def leaves(prompt, response):
        raise error

    async def stays(prompt, response):
        return 1.0

    assert type(error).__name__ in outcomes_of(leaves)[0].what
    assert outcomes_of(stays)[0] == {"kind": 1.0}


def test_an_async_reward_may_score_by_another_composer():
    class Inner(KonicLLMRewardComposer):
        @llm_reward
        async def inner(self, prompt, response):
            await asyncio.sleep(0)
            return len(response)

    async def outer(prompt, response):
        return Inner().compose(prompt, response)

    assert outcomes_of(outer)[0] == {"kind": float(len(RESPONSES[0]))}


def test_an_error_whose_text_cannot_be_made_is_a_fault():
    class Mute(Exception):
        def __str__(self):
            return self.missing

    def reward(prompt, response):
        raise Mute

    assert outcomes_of(reward)[0].what == "raised Mute: its message could not be read"


def test_an_object_with_an_async_call_is_awaited_together_with_a_limit():
    class Judge:
        async def __call__(self, prompt, response):
            await asyncio.sleep(30)

    assert all("took longer" in outcome.what for outcome in outcomes_of(Judge(), 0.05))


# --- what cannot be written, and what would be lost ---


HALF = "\ud800"


@pytest.mark.parametrize("error", [ValueError(f"bad {HALF} name"), FileNotFoundError(2, "no", "caf\udce9.txt")])
def test_half_a_character_in_an_error_is_escaped(error):
    def kind(prompt, response):
        raise error

    def kinds(prompts, responses):
        raise error

    for function in (kind, kinds):
        for fault in outcomes_of(function):
            assert "\\ud" in fault.what and "\\ud" in fault.traceback
            (fault.what + fault.traceback).encode()


def test_a_huge_message_of_an_error_is_shortened():
    def kind(prompt, response):
        raise ValueError("x" * 10**6)

    fault = outcomes_of(kind)[0]
    assert len(fault.what) < 1100 and fault.what.endswith("… (1000000 characters)")


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({f"a{HALF}": 1.0}, r"returned the key 'a\\ud800', which contains half a character"),
        ({1: 1.0, "1": 5.0}, r"returned two keys that are the same text, '1'"),
        (np.ma.masked, "a masked value and not a number"),
        (np.ma.masked_array([1.0], mask=[True]), "a masked value and not a number"),
        ({"x": np.ma.masked}, "a masked value and not a number"),
    ],
)
def test_a_value_that_would_be_lost_or_could_not_be_written_is_a_fault(value, told):
    with pytest.raises(RewardError, match=told):
        raise outcome_of(value).error("p", "r")


def test_a_masked_value_of_a_batch_is_a_fault_and_the_others_count():
    first, *others = batch_outcomes(np.ma.masked_array([1.0, 2.0, 3.0], mask=[True, False, False]))
    assert "a masked value" in first.what
    assert others == [{"kind": 2.0}, {"kind": 3.0}]


def of_any_keywords(**kwargs):
    return worth(kwargs["prompt"], kwargs["response"])


def of_the_prompt_and_keywords(prompt, **kwargs):
    return worth(prompt, kwargs["response"])


def of_the_response_and_keywords(response, **kwargs):
    return worth(kwargs["prompt"], response)


def of_a_keyword_and_keywords(*, response, **kwargs):
    return worth(kwargs["prompt"], response)


@pytest.mark.parametrize(
    "function",
    [of_any_keywords, of_the_prompt_and_keywords, of_the_response_and_keywords, of_a_keyword_and_keywords],
)
def test_keywords_of_any_name_take_the_texts(function):
    reward = Reward("kind", function)
    require_a_response(reward)
    found = list(call_reward(reward, samples_from_texts(PROMPTS, RESPONSES, {"label": LABELS})))
    assert [outcome["kind"] for outcome in found] == [11, 22, 34]


def test_a_place_beside_keywords_that_could_be_either_text_is_refused():
    with pytest.raises(RewardError, match=r"takes no response. Its parameters are .*not text, kwargs"):
        require_a_response(Reward("kind", lambda text, **kwargs: 1.0))
