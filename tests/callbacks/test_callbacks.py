import inspect
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from konic.finetuning.callbacks.composite import Callbacks, CompositeCallback
from konic.finetuning.callbacks.console import KonicFinetuningCallback, iteration_line
from konic.finetuning.callbacks.hooks import BaseKonicFinetuningCallback
from konic.finetuning.callbacks.json_lines import JsonLinesCallback
from konic.finetuning.callbacks.mlflow import MLflowCallback
from konic.finetuning.errors import ConfigError
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult
from konic.text import printable

CONFIG = {  # all that the contract promises
    "model_name": "gpt2",
    "use_lora": True,
    "learning_rate": 5e-5,
    "batch_size": 4,
    "max_iterations": 50,
    "kl_penalty_weight": 0.05,
}
BANNER = """\
============================================================
Starting RLHF Training
============================================================
Model: gpt2
LoRA: True
Learning Rate: 5e-05
Batch Size: 4
Max Iterations: 50
============================================================

"""
FIRST_LINE = "[Iter    1] Reward:   0.423 (+/- 0.156) | KL: 0.0000 | Loss: 2.3451 | Time: 1.2s"
SUMMARY_START = """\
==================================================
Finetuning Results Summary
==================================================
Model: gpt2
Total Iterations: 50
Best Reward: 0.7234 (iteration 47)
Final Reward: 0.6870
"""
HOOKS = {
    "on_train_begin": (CONFIG,),
    "on_iteration_begin": (1,),
    "on_generation_begin": (["p"],),
    "on_generation_end": (["p"], ["r"]),
    "on_reward_computed": ([1.0], {"a": [1.0]}),
    "on_iteration_end": ("result",),
    "on_checkpoint_saved": ("path", 1),
    "on_train_end": ("result",),
}


def iteration(number=1, **values):
    defaults = {
        "reward_mean": 0.423, "reward_std": 0.156, "reward_min": 0.1, "reward_max": 0.7, "kl_divergence": 0.0,
        "policy_loss": -0.01, "value_loss": 1.0, "entropy_loss": -2.0, "total_loss": 2.3451,
        "response_length_mean": 20.0, "response_length_std": 3.0, "learning_rate": 5e-5, "clip_fraction": 0.1,
        "approx_kl": 0.01, "explained_variance": 0.5, "reward_breakdown": {"a": 0.4}, "generation_time_sec": 0.7,
        "reward_compute_time_sec": 0.1, "update_time_sec": 0.4, "total_time_sec": 1.2345,
    }  # fmt: skip
    return FinetuningIterationResult(iteration=number, **(defaults | values))


def finished():
    rewards = [0.5] * 46 + [0.7234, 0.6, 0.6, 0.687]
    history = [iteration(number, reward_mean=reward) for number, reward in enumerate(rewards, start=1)]
    return FinetuningResult("gpt2", history, 60.0, "runs/x/final")


class Recorder(BaseKonicFinetuningCallback):
    """Notes every hook that is called, in a list that several may share."""

    def __init__(self, name, calls, stops=False):
        self.name, self.calls, self.stops = name, calls, stops

    def __getattribute__(self, hook):
        if not hook.startswith("on_"):
            return super().__getattribute__(hook)
        return lambda *values: self.calls.append((self.name, hook, values))

    def should_stop_early(self, result):
        self.calls.append((self.name, "should_stop_early", (result,)))
        return self.stops


@pytest.mark.parametrize("stops", [True, np.True_, np.array(True), torch.tensor(True)])
def test_any_true_stops(stops):
    callbacks = CompositeCallback([Recorder("a", [], stops=None), Recorder("b", [], stops=stops)])
    assert callbacks.should_stop_early(iteration()) is True
    assert CompositeCallback([Recorder("a", []), Recorder("b", [], stops=None)]).should_stop_early(iteration()) is False


@pytest.mark.parametrize("answer", ["stop", 1, np.array([True, False]), torch.ones(2, dtype=torch.bool), [], np.nan])
@pytest.mark.parametrize("first", [True, False])
def test_an_answer_that_is_not_true_or_false_names_the_callback(answer, first):
    callbacks = CompositeCallback([Recorder("a", [], stops=first), Recorder("b", [], stops=answer)])
    with pytest.raises(
        ConfigError, match=r"Callback Recorder\.should_stop_early returned a value of type \w+: it must"
    ):
        callbacks.should_stop_early(iteration())


# --- what is printed ---


def test_the_banner_is_the_contracts_and_needs_no_more_than_the_contracts_keys(capsys):
    KonicFinetuningCallback().on_train_begin(CONFIG)
    assert capsys.readouterr() == (BANNER, "")


def test_further_settings_change_nothing_in_the_banner(capsys):
    KonicFinetuningCallback().on_train_begin(CONFIG | {"gamma": 1.0, "rewards": ["a"], "iterations_done": 3})
    assert capsys.readouterr().out == BANNER


def test_an_iterations_line_is_the_contracts(capsys):
    KonicFinetuningCallback().on_iteration_end(iteration())
    assert capsys.readouterr() == (FIRST_LINE + "\n", "")


def test_a_later_line_keeps_its_columns():
    result = iteration(1234, reward_mean=-12.3456, reward_std=10.0, kl_divergence=1.23456, total_loss=-0.5)
    line = iteration_line(result)
    assert line == "[Iter 1234] Reward: -12.346 (+/- 10.000) | KL: 1.2346 | Loss: -0.5000 | Time: 1.2s"


@pytest.mark.parametrize("kl", [-0.0, 0.0, 1e-9, -1e-9])
def test_kl_is_never_printed_as_minus_zero(kl):
    assert "| KL: 0.0000 |" in iteration_line(iteration(kl_divergence=kl))


def test_an_iteration_without_any_reward_still_has_a_line():
    assert "Reward:     nan" in iteration_line(iteration(reward_mean=float("nan")))


def test_the_summary_block_is_the_contracts(capsys):
    KonicFinetuningCallback().on_train_end(finished())
    out, err = capsys.readouterr()
    assert out.lstrip("\n").startswith(SUMMARY_START)
    assert out.endswith("\n" + "=" * 50 + "\n")
    assert err == ""


@pytest.mark.parametrize(("interval", "printed"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [1, 3, 6]), (10, [1])])
def test_log_interval_prints_the_first_and_every_so_many(capsys, interval, printed):
    callback = KonicFinetuningCallback(log_interval=interval)
    for number in range(1, 8):
        callback.on_iteration_end(iteration(number))
    assert [int(line[6:10]) for line in capsys.readouterr().out.splitlines()] == printed


def whole_run(callback):
    callback.on_train_begin(CONFIG)
    callback.on_iteration_begin(1)
    callback.on_generation_begin(["p0", "p1"])
    callback.on_generation_end(["p0", "p1"], ["r0\n", "r1\x1b[31m"])
    callback.on_reward_computed([0.5, float("nan")], {"a": [0.5, float("nan")]})
    callback.on_iteration_end(iteration())
    callback.should_stop_early(iteration())
    callback.on_checkpoint_saved("runs/x/checkpoint-1", 1)
    callback.on_train_end(finished())


def test_not_verbose_prints_nothing(capsys):
    whole_run(KonicFinetuningCallback(verbose=False, log_samples=True))
    assert capsys.readouterr() == ("", "")


def test_a_whole_run_prints_banner_line_and_summary_and_nothing_on_standard_error(capsys):
    whole_run(KonicFinetuningCallback())
    out, err = capsys.readouterr()
    assert out.startswith(BANNER + FIRST_LINE + "\n")
    assert out.removeprefix(BANNER + FIRST_LINE).lstrip("\n").startswith(SUMMARY_START)
    assert err == ""


def test_samples_go_to_standard_error_with_their_rewards_and_without_control_characters(capsys):
    whole_run(KonicFinetuningCallback(log_samples=True))
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert all(part in first for part in ("+0.500", "p0", "r0\\n"))
    assert all(part in second for part in ("nan", "p1", "r1\\x1b[31m"))
    assert "p0" not in out


def test_at_most_so_many_samples_are_logged(capsys):
    callback = KonicFinetuningCallback(log_samples=True, max_samples_to_log=2)
    callback.on_generation_end([f"p{n}" for n in range(5)], ["r"] * 5)
    callback.on_reward_computed([0.0] * 5, {})
    err = capsys.readouterr().err
    assert ["p0" in err, "p1" in err, "p2" in err] == [True, True, False]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, é and 漢字 and 😀!", "plain text, é and 漢字 and 😀!"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\x1b[2J\x07\x00\x7f", "\\x1b[2J\\x07\\x00\\x7f"),
        ("\x9b31m", "\\x9b31m"),  # the one-character form of ESC [
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),  # turns the direction of what follows
        ("a\u2028b\u200bc", "a\\u2028b\\u200bc"),
        ("\ud800", "\\ud800"),
    ],
)
def test_printable_escapes_what_could_steer_a_terminal(text, shown):
    assert printable(text) == shown


def test_a_models_name_cannot_steer_a_terminal(capsys):
    KonicFinetuningCallback().on_train_begin(CONFIG | {"model_name": "a\x1b[2J"})
    assert "Model: a\\x1b[2J\n" in capsys.readouterr().out


# --- early stopping ---


@pytest.mark.parametrize(
    ("patience", "kls", "stops"),
    [
        (1, [0.1, 0.3], [False, True]),
        (2, [0.3, 0.3, 0.1], [False, True, False]),
        (3, [0.3, 0.3, 0.1, 0.3, 0.3, 0.3], [False, False, False, False, False, True]),
        (1, [0.2], [False]),  # at the threshold is not above it
        (5, [9.0] * 5, [False] * 4 + [True]),
    ],
)
def test_early_stopping_needs_so_many_iterations_in_a_row_above_the_threshold(patience, kls, stops):
    callback = KonicFinetuningCallback(early_stop_kl_threshold=0.2, early_stop_patience=patience)
    assert [callback.should_stop_early(iteration(kl_divergence=kl)) for kl in kls] == stops


def test_the_count_of_iterations_above_starts_anew_with_each_run(capsys):
    callback = KonicFinetuningCallback(early_stop_kl_threshold=0.2, early_stop_patience=2)
    assert not callback.should_stop_early(iteration(kl_divergence=1.0))
    callback.on_train_begin(CONFIG)
    assert not callback.should_stop_early(iteration(kl_divergence=1.0))


def test_without_a_threshold_nothing_stops_early():
    callback = KonicFinetuningCallback(early_stop_patience=1)
    assert not any(callback.should_stop_early(iteration(kl_divergence=kl)) for kl in (0.0, 1e9, float("inf")))


@pytest.mark.parametrize("options", [{"log_interval": 0}, {"early_stop_patience": 0}])
def test_counts_below_one_are_refused(options):
    with pytest.raises(ConfigError, match="whole number of at least 1"):
        KonicFinetuningCallback(**options)


# --- several callbacks as one ---


def test_the_base_class_has_every_hook_of_the_contract_and_does_nothing(capsys):
    base = BaseKonicFinetuningCallback()
    for hook, values in HOOKS.items():
        assert getattr(base, hook)(*values) is None
    assert base.should_stop_early("result") is False
    assert capsys.readouterr() == ("", "")


def test_the_options_are_those_of_the_contract_with_their_defaults():
    parameters = inspect.signature(KonicFinetuningCallback).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "log_interval": 1, "log_samples": False, "max_samples_to_log": 3, "use_mlflow": False,
        "early_stop_kl_threshold": None, "early_stop_patience": 5, "verbose": True,
    }  # fmt: skip


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_goes_to_every_callback_in_the_order_given(hook):
    calls = []
    silent = KonicFinetuningCallback(verbose=False)
    values = {"on_iteration_end": (iteration(),), "on_train_end": (finished(),)}.get(hook, HOOKS[hook])
    getattr(Callbacks([Recorder("a", calls), silent, Recorder("b", calls)]), hook)(*values)
    assert calls == [("a", hook, values), ("b", hook, values)]


@pytest.mark.parametrize("stops", [(False, False), (True, False), (False, True), (True, True)])
def test_any_callback_may_stop_the_run_and_all_are_asked(stops):
    calls = []
    recorders = [Recorder(name, calls, stop) for name, stop in zip("ab", stops, strict=True)]
    assert Callbacks(recorders).should_stop_early(iteration()) is any(stops)
    assert [name for name, *_ in calls] == ["a", "b"]


def test_a_callback_for_which_other_processes_wait_too_long_is_named(caplog):
    class Uploads(KonicFinetuningCallback):
        pass

    callbacks = Callbacks([Uploads(verbose=False)])
    callbacks.on_iteration_begin(1)
    callbacks.patience_seconds = 1000.0
    callbacks.on_iteration_begin(2)
    assert caplog.text == ""
    callbacks.patience_seconds = 0.0
    callbacks.on_iteration_begin(3)
    [message] = caplog.messages
    assert message.startswith("Callback 'Uploads' took 0 s, and the other processes wait for at most process_timeout_s")


@pytest.mark.parametrize("given", [None, [], (), "recorder"])
def test_a_printer_comes_first_where_none_is_given(capsys, given):
    class Talker(BaseKonicFinetuningCallback):
        def on_train_begin(self, config):
            print("the user's own")

    own = Talker() if given == "recorder" else given
    Callbacks(own).on_train_begin(CONFIG)
    assert capsys.readouterr().out == BANNER + ("the user's own\n" if given == "recorder" else "")


class Counting(BaseKonicFinetuningCallback):
    def on_iteration_end(self, result):
        print(f"iteration {result.iteration}")


@pytest.mark.parametrize("given", [Counting(), [Recorder("a", []), Counting()], CompositeCallback([Counting()])])
def test_a_callback_that_handles_iterations_replaces_the_printer(capsys, given):
    callbacks = Callbacks(given)
    callbacks.on_train_begin(CONFIG)
    callbacks.on_iteration_end(iteration())
    assert capsys.readouterr().out == "iteration 1\n"


def test_a_tracker_or_a_silent_printer_changes_nothing_about_who_prints(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", ModuleType("mlflow"))
    for given, printers in (
        (MLflowCallback(), 1),
        (CompositeCallback([MLflowCallback()]), 1),
        (KonicFinetuningCallback(verbose=False), 0),
        (CompositeCallback([KonicFinetuningCallback()]), 0),
    ):
        assert len(Callbacks(given).callbacks) == 1 + printers


@pytest.mark.parametrize("as_list", [True, False])
def test_a_given_printer_is_the_only_one(capsys, as_list):
    class Mine(KonicFinetuningCallback):
        def on_iteration_end(self, result):
            print("mine")

    callbacks = Callbacks([Mine()] if as_list else Mine())
    callbacks.on_train_begin(CONFIG)
    callbacks.on_iteration_end(iteration())
    assert capsys.readouterr().out == BANNER + "mine\n"


def test_a_list_given_is_left_as_it_was():
    given = [Recorder("a", [])]
    Callbacks(given)
    assert len(given) == 1


@pytest.mark.parametrize("given", ["print", print, 3, [KonicFinetuningCallback(), None], object()])
def test_what_is_no_callback_is_refused(given):
    with pytest.raises(ConfigError, match="is not a BaseKonicFinetuningCallback"):
        Callbacks(given)


@pytest.mark.parametrize("given", [KonicFinetuningCallback, [KonicFinetuningCallback]])
def test_a_class_in_place_of_a_callback_is_answered_with_how_to_make_one(given):
    with pytest.raises(ConfigError, match=r"Give an instance: add \(\)"):
        Callbacks(given)


def test_every_hook_reaches_every_callback_in_order():
    """Each hook of the base class is spelled out in the composite, or one added later would reach nobody."""
    hooks = [name for name, member in vars(BaseKonicFinetuningCallback).items() if inspect.isfunction(member)]
    assert len(hooks) == 10
    assert not set(hooks) - vars(CompositeCallback).keys()
    called = []

    class Noted(KonicFinetuningCallback):
        def __init__(self, name):
            super().__init__(verbose=False)
            self.name = name

    for hook in hooks:
        setattr(Noted, hook, lambda self, *values, hook=hook: called.append((self.name, hook, values)))
    both = Callbacks([Noted("first"), Noted("second")])
    for hook in hooks:
        values = tuple(f"{hook} {name}" for name in list(inspect.signature(getattr(both, hook)).parameters))
        getattr(both, hook)(*values)
        assert called[-2:] == [("first", hook, values), ("second", hook, values)]


class Breaks(BaseKonicFinetuningCallback):
    def __init__(self, failure):
        self.failure = failure

    def on_train_error(self, error):
        raise self.failure


class Hears(BaseKonicFinetuningCallback):
    def on_train_error(self, error):
        self.heard = error


@pytest.mark.parametrize("failure", [ValueError("a sick tracker"), SystemExit(3)])
def test_a_callback_that_fails_on_an_error_hides_neither_the_error_nor_the_other_callbacks(failure, caplog):
    first, hears = RuntimeError("the run's own"), Hears()
    with pytest.raises(RuntimeError) as raised, CompositeCallback([Breaks(failure), hears]).reporting_errors():
        raise first
    assert raised.value is hears.heard is first
    assert "Callback 'Breaks' failed in on_train_error" in caplog.text


def test_a_misspelt_hook_is_a_warning(caplog):
    class Typo(BaseKonicFinetuningCallback):
        def on_iteration_ended(self, result):
            pass

        def on_slack(self):
            pass

    Callbacks(Typo())
    assert "Callback Typo.on_iteration_ended is not a hook" in caplog.text
    assert "Did you mean 'on_iteration_end'?" in caplog.text
    assert "on_slack" not in caplog.text


def test_hooks_that_would_never_run_are_refused_when_the_callback_is_given():
    class Waits(BaseKonicFinetuningCallback):
        async def should_stop_early(self, result):
            return True

    class Yields(KonicFinetuningCallback):
        def on_iteration_end(self, result):
            yield result

    for kind, hook in ((Waits, "should_stop_early"), (Yields, "on_iteration_end")):
        with pytest.raises(ConfigError, match=f"Callback {kind.__name__}.{hook} would never run"):
            Callbacks([KonicFinetuningCallback(), kind()])


@pytest.mark.parametrize("base", [KonicFinetuningCallback, MLflowCallback, JsonLinesCallback])
def test_a_callback_that_was_not_set_up_says_what_its_init_lacks(base):
    class Forgets(base):
        def __init__(self):
            self.mine = []

    with pytest.raises(ConfigError, match=r"Callback Forgets: its __init__ must call super\(\).__init__\(\)"):
        Callbacks(Forgets())


def takes_nothing(self):
    """Of the wrong shape for every hook that gets something."""


def takes_too_much(self, first, second, third):
    """Of the wrong shape for every hook."""


@pytest.mark.parametrize("hook", ["on_train_begin", "on_iteration_end", "on_reward_computed", "on_train_end"])
@pytest.mark.parametrize("method", [takes_nothing, takes_too_much])
def test_a_hook_that_cannot_be_called_is_an_error_before_training(hook, method):
    kind = type("Own", (BaseKonicFinetuningCallback,), {hook: method})
    with pytest.raises(ConfigError, match=rf"Callback Own\.{hook}\(.*cannot be called .*Write {hook}\(self, "):
        CompositeCallback([kind()])


def test_a_hook_may_name_its_parameters_as_it_likes():
    own = {"on_iteration_end": lambda self, outcome, more=None: None, "on_train_end": lambda self, *given: None}
    CompositeCallback([type("Own", (BaseKonicFinetuningCallback,), own)()])


def test_of_several_that_print_the_first_does(capsys):
    quiet, first, second = (KonicFinetuningCallback(verbose=verbose) for verbose in (False, True, True))
    callbacks = Callbacks([quiet, CompositeCallback([first]), second])
    callbacks.on_train_begin(CONFIG)
    assert capsys.readouterr().out == BANNER
    Callbacks(second).on_train_begin(CONFIG)  # alone it prints
    assert capsys.readouterr().out == BANNER


def test_beside_one_whose_lines_are_its_own_the_plain_one_prints(capsys):
    class Mine(KonicFinetuningCallback):
        def on_iteration_end(self, result):
            """Prints nothing."""

    callbacks = Callbacks([Mine(), KonicFinetuningCallback()])
    callbacks.on_train_begin(CONFIG)
    callbacks.on_iteration_end(iteration())
    assert capsys.readouterr().out == BANNER + FIRST_LINE + "\n"
    Callbacks(Mine()).on_train_begin(CONFIG)
    assert capsys.readouterr().out == BANNER


def test_one_callback_twice_is_an_error():
    callback = KonicFinetuningCallback()
    with pytest.raises(ConfigError, match="one object is given twice"):
        Callbacks([callback, CompositeCallback([callback])])
