"""The live view: what it draws, where it is shown, and that it leaves every printed line as it is."""

import dataclasses
import io
import logging
import sys
import types

import pytest
from rich.cells import cell_len
from rich.console import Console
from test_callbacks import BANNER, CONFIG, FIRST_LINE, finished, iteration

from konic.finetuning.callbacks import display
from konic.finetuning.callbacks.composite import Callbacks
from konic.finetuning.callbacks.console import KonicFinetuningCallback
from konic.finetuning.callbacks.live import LiveState, draw, sparkline


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def state(iterations=3, settings=(), **values):
    made = LiveState(CONFIG | {"kl_limit": 10.0} | dict(settings), started=0.0)
    for number in range(1, iterations + 1):
        made.begin_iteration(2.0 * number)
        defaults = {"reward_mean": number / 10, "kl_per_response": 2.5, "num_samples": 16, "total_time_sec": 2.0}
        made.add(iteration(number, **(defaults | values)), now=2.0 * number + 2)
    return made


def drawn(made, width=80, height=24, now=10.0, **options):
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(draw(made, width, height, now, **options))
    return console.file.getvalue()


def test_a_sparkline_by_hand():
    assert sparkline([0.0, 1.0, 2.0, 3.5, 7.0], 10) == "▁▂▃▅█"
    assert sparkline([9.0, 0.0, float("nan"), 7.0], 3) == "▁ █"
    assert sparkline([2.0, 2.0], 5) == "▄▄"
    assert sparkline([], 5) == sparkline([float("nan"), float("inf")], 5) == ""


def test_the_view_shows_what_a_run_is_judged_by():
    made = state(checks=("kl_budget",), reward_breakdown={"brief": 0.25, "kind": 0.5}, clip_fraction=0.123, entropy=1.5)
    made.phase, made.memory_bytes = "sampling", 3 * 2**30
    made.set_sample("The film", "was great", 1.25)
    shown = drawn(made)
    for part in (
        "gpt2", "4 of 50", "0:10 passed, 1:32 left", "0.300 ± 0.156", "best 0.300 (iteration 3)", "0.250", "brief",
        "2.50 of 10", "kl_limit", "20.0 tokens", "entropy 1.50", "clipped 12.3%", "160 tokens/s", "3.0 GiB",
        "kl_budget (iteration 1)", "+1.250", "The film", "was great", "sampling",
    ):  # fmt: skip
        assert part in shown, part


def test_names_from_a_checkpoint_of_others_steer_no_terminal():
    made = state(checks=("\x1b[2J\x1b]0;evil\x07",), reward_breakdown={"\x1b[31mred": 0.1})
    made.set_sample("\x1b[2Ja", "b\x1b[3J", 1.0)
    shown = drawn(made)
    assert "\x1b" not in shown and "\x07" not in shown and r"\x1b[2J" in shown


@pytest.mark.parametrize(("width", "height"), [(20, 5), (40, 10), (80, 24), (80, 40), (160, 50), (400, 12)])
@pytest.mark.parametrize("iterations", [0, 3])
def test_it_fits_every_terminal_and_keeps_its_height(width, height, iterations):
    made = state(iterations, reward_breakdown={f"reward{number}": 0.5 for number in range(40)})
    before = drawn(made, width, height).splitlines()
    made.set_sample("漢字 " * 500, "long " * 3000, 0.0)
    lines = drawn(made, width, height).splitlines()
    assert len(lines) == len(before) < height
    assert {cell_len(line) for line in lines} == {width}
    assert not iterations or width < 80 or "more rewards" in "".join(lines)


@pytest.mark.parametrize(("kl", "colours"), [(8.9, set()), (9.1, {"31"})])
def test_only_what_needs_attention_has_a_colour(kl, colours):
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="truecolor")
    console.print(draw(state(kl_per_response=kl), 80, 24, 10.0))
    codes = {code for part in console.file.getvalue().split("\x1b[")[1:] for code in part.split("m")[0].split(";")}
    assert codes == {"0", "1"} | colours  # reset, bold, red


@pytest.mark.parametrize(
    ("width", "shown"), [(64, "4 of 50       --------  0:10"), (63, "0:10 passed, 1:32 left"), (40, "1:32 left")]
)
def test_the_time_left_is_the_last_to_go_where_the_terminal_is_narrow(width, shown):
    line = next(line for line in drawn(state(), width).splitlines() if "iteration " in line)
    assert shown in line and "1:32 left" in line and ("---" in line) == (width >= 64)


def test_it_draws_in_ascii_where_the_terminal_has_no_more():
    made = state(reward_breakdown={"größe": 0.5})
    made.set_sample("Café 漢字 " * 20, "漢字 and more, " * 40, 0.5)
    lines = drawn(made, ascii_only=True).splitlines()
    assert "".join(lines).isascii() and {len(line) for line in lines} == {80}
    assert "0.300 +/- 0.156" in lines[2] and "Caf? ???? Caf?" in "".join(lines)


@pytest.mark.parametrize(
    ("settings", "shown"),
    [({"kl_target": 4.0}, "2.50 of 4 "), ({"kl_budget": 5.0}, "2.50 of 5 "), ({"kl_limit": None}, "2.50  ")],
)
def test_kl_stands_against_its_target_budget_or_limit(settings, shown):
    assert shown in drawn(state(settings=settings))


def test_the_remaining_time_is_at_most_max_minutes():
    assert state().seconds_left(now=10.0) == pytest.approx(47 * 2.0 - 2.0)
    assert state(settings={"max_minutes": 0.5}).seconds_left(now=10.0) == pytest.approx(20.0)
    assert state(0).seconds_left(now=10.0) is None


def test_text_of_a_model_steers_no_terminal_and_shows_no_secret(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "plain7Token")
    made = state(reward_breakdown={"a\x1b[2J[red]": 1.0})
    made.set_sample("[bold]p\x1b[31m", "r\u202e plain7Token [/]", float("nan"))
    shown = drawn(made)
    assert "[bold]p\\x1b[31m" in shown and "r\\u202e *** [/]" in shown and "a\\x1b[2J[red]" in shown


# --- where it is shown ---


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)

    def connect():  # within the test: pytest sets the streams between a fixture and its test
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return connect


def run(callback, print_in_reward=lambda: None, result=None):
    callback.on_train_begin(CONFIG)
    callback.on_iteration_begin(1)
    callback.on_generation_begin(["p0"])
    callback.on_generation_end(["p0"], ["r0"])
    print_in_reward()
    callback.on_reward_computed([0.5], {"a": [0.5]})
    callback.on_iteration_end(result or iteration())
    callback.on_train_end(finished())


def test_on_a_terminal_the_lines_stand_above_the_view_and_it_is_gone_at_the_end(terminal):
    terminal = terminal()
    handler = logging.StreamHandler(terminal)
    logging.getLogger("someone").addHandler(handler)

    def speak():
        print("the user's own")
        logging.getLogger("someone").warning("kept its stream")

    run(KonicFinetuningCallback(), speak)
    logging.getLogger("someone").removeHandler(handler)
    text = terminal.getvalue()
    assert "╭" in text and "iteration" in text
    for line in (
        *BANNER.split("\n")[:3],
        FIRST_LINE,
        "the user's own",
        "kept its stream",
        "Total Iterations: 50",
    ):
        assert line in text
    for spoken in ("the user's own", "kept its stream"):  # the line before it is erased, and the view drawn again
        before, after = text.split(spoken)
        assert before.rstrip("\r\n").endswith("\x1b[2K") and "╭" in after
    assert "\x1b[?25l" not in text.split("\x1b[?25h", 1)[1]  # the cursor is back at once: a kill may come at any time
    assert sys.stdout is sys.stderr is terminal and handler.stream is terminal


class LaterBrief(KonicFinetuningCallback):
    """A subclass beside the plain one, as docs/recipes.md shows both."""


def test_beside_each_other_callbacks_show_one_view_and_print_each_line_once(terminal):
    terminal = terminal()
    handler = logging._StderrHandler()  # as a library's logger may have
    logging.getLogger("someone").addHandler(handler)
    callbacks = Callbacks([KonicFinetuningCallback(early_stop_kl_threshold=9.0), LaterBrief()])
    try:
        run(callbacks)
        run(callbacks)  # the view of the first run is free again
    finally:
        logging.getLogger("someone").removeHandler(handler)
    lines = terminal.getvalue().replace("\r", "\n").split("\n")
    assert [sum(line.endswith(end) for line in lines) for end in (FIRST_LINE, "Total Iterations: 50")] == [2, 2]
    assert terminal.getvalue().count("\x1b[?25h") == 4  # two views; one at a time
    assert sys.stdout is sys.stderr is terminal


def test_a_second_run_at_the_same_time_has_no_view(terminal):
    terminal()
    first, second = (display.open_display(LiveState(CONFIG, 0.0)) for _ in range(2))
    assert first is not None and second is None
    first.stop()
    third = display.open_display(LiveState(CONFIG, 0.0))
    third.stop()


def test_of_a_progress_bar_the_last_state_of_its_line_stands_above(terminal):
    terminal = terminal()

    def show_bars():
        for text in ("\rone   0%", "\rone  50%", "\rone 100%", "\n", "\rtwo   0%", "\rtwo 100%\r", "        \r"):
            sys.stderr.write(text)
            sys.stderr.flush()
        print("a line\r\nits end", end=" ")
        print("and more", end="", flush=True)
        print("\rthree 100%", end="", file=sys.stderr, flush=True)

    run(KonicFinetuningCallback(), show_bars)
    text = terminal.getvalue()
    assert [state for state in ("one   0%", "one  50%", "two") if state in text] == []
    for line in ("one 100%\n", "a line\n", "its end and more\n", "three 100%\n"):
        assert text.count(line) == 1, line


@pytest.mark.parametrize(("columns", "line"), [("79", " ".join(FIRST_LINE.split())), ("80", FIRST_LINE)])
def test_the_line_of_an_iteration_loses_its_padding_before_it_wraps(terminal, monkeypatch, columns, line):
    terminal = terminal()
    monkeypatch.setenv("COLUMNS", columns)
    run(KonicFinetuningCallback())
    assert f"{line}\n" in terminal.getvalue()


@pytest.mark.parametrize(("columns", "is_said"), [("100", True), ("99", False)])
def test_a_terminal_with_room_says_how_many_responses_were_left_out(terminal, monkeypatch, columns, is_said):
    terminal = terminal()
    monkeypatch.setenv("COLUMNS", columns)
    result = dataclasses.replace(iteration(), num_samples=12, num_in_equal_groups=4, num_cut_off=2, num_unscored=1)
    run(KonicFinetuningCallback(), result=result)
    assert f"{FIRST_LINE}{' | Left out: 7 of 12' if is_said else ''}\n" in terminal.getvalue()


def test_an_error_or_ctrl_c_leaves_a_clean_terminal(terminal):
    terminal = terminal()
    callback = KonicFinetuningCallback()
    callback.on_train_begin(CONFIG)
    callback.on_train_error(KeyboardInterrupt())
    assert terminal.getvalue().endswith("\x1b[2K") and "\x1b[?25h" in terminal.getvalue()
    assert sys.stderr is terminal


def test_the_cursor_waits_at_the_start_of_a_line_where_ctrl_c_shows_itself(terminal):
    terminal = terminal()
    callback = KonicFinetuningCallback()
    callback.on_train_begin(CONFIG)
    assert terminal.getvalue().replace("\x1b[?25h", "").endswith("╯\r")
    callback.on_train_error(KeyboardInterrupt())


def test_a_narrower_terminal_keeps_no_rest_of_the_picture(terminal, monkeypatch):
    terminal = terminal()
    monkeypatch.setenv("COLUMNS", "80")
    callback = KonicFinetuningCallback()
    callback.on_train_begin(CONFIG)
    height = callback._display._live._live_render.last_render_height
    monkeypatch.setattr(Console, "width", 40)
    before = len(terminal.getvalue())
    callback._display._live.refresh()
    assert terminal.getvalue()[before:].count("\x1b[1A") == 2 * height - 1  # each line had become two
    callback.on_train_error(KeyboardInterrupt())


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("TERM", "unknown"), ("TTY_INTERACTIVE", "0")])
def test_a_terminal_that_cannot_draw_gets_the_plain_lines(terminal, monkeypatch, name, value):
    terminal = terminal()
    monkeypatch.setenv(name, value)
    run(KonicFinetuningCallback())
    assert terminal.getvalue().startswith(BANNER + FIRST_LINE + "\n") and "\x1b" not in terminal.getvalue()


@pytest.mark.parametrize("no_color", ["", "1"])
def test_without_colour_there_is_none(terminal, monkeypatch, no_color):
    terminal = terminal()
    monkeypatch.setenv("NO_COLOR", no_color)
    callback = KonicFinetuningCallback()
    callback.on_train_begin(CONFIG)
    callback.on_iteration_end(iteration(checks=("kl_runaway",)))
    callback._display._live.refresh()
    callback.on_train_error(KeyboardInterrupt())
    assert "kl_runaway" in terminal.getvalue()
    assert ("\x1b[31m" in terminal.getvalue()) == (not no_color)


def test_piped_lines_are_the_same_beside_a_view_on_standard_error(terminal, monkeypatch):
    terminal = terminal()
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    run(KonicFinetuningCallback(), lambda: print("the user's own"))
    assert pipe.getvalue().startswith(f"{BANNER}the user's own\n{FIRST_LINE}\n")
    assert "╭" in terminal.getvalue() and "Reward:" not in terminal.getvalue()


def test_standard_output_shows_it_where_standard_error_is_a_file(terminal, monkeypatch):
    terminal = terminal()
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    run(KonicFinetuningCallback(log_samples=True))
    assert sys.stderr.getvalue() == "  +0.500  p0 → r0\n"
    assert "╭" in terminal.getvalue()


def test_not_verbose_shows_nothing_on_a_terminal_either(terminal):
    terminal = terminal()
    run(KonicFinetuningCallback(verbose=False))
    assert terminal.getvalue() == ""


def test_what_the_view_cannot_draw_ends_no_run(terminal, monkeypatch):
    terminal = terminal()
    monkeypatch.setattr(display, "draw", lambda *_: 1 / 0)
    run(KonicFinetuningCallback())
    assert "The live view failed: ZeroDivisionError" in terminal.getvalue()
    assert "Total Iterations: 50" in terminal.getvalue()


def test_it_is_drawn_about_once_a_second_and_when_something_is_printed(terminal, monkeypatch):
    terminal = terminal()
    draws = []
    monkeypatch.setattr(display, "draw", lambda *values: draws.append(values) or "picture")
    callback = KonicFinetuningCallback(log_interval=1000)
    callback.on_train_begin(CONFIG)
    for number in range(2, 900):
        callback.on_iteration_begin(number)
        callback.on_generation_begin(["p"])
        callback.on_iteration_end(iteration(number))
    callback.on_train_error(KeyboardInterrupt())
    assert len(draws) <= 5 + display._DRAWS_PER_SECOND * 2


def test_a_resumed_run_shows_the_iterations_before_it(terminal):
    terminal = terminal()
    callback = KonicFinetuningCallback()
    callback.on_train_begin(CONFIG | {"iterations_done": 2})
    for number in (1, 2):
        callback.should_stop_early(iteration(number))
    callback.on_iteration_begin(3)
    callback.on_iteration_end(iteration(3))
    callback.should_stop_early(iteration(3))
    assert [result.iteration for result in callback._live.history] == [1, 2, 3]
    callback.on_train_error(KeyboardInterrupt())


def test_a_notebook_shows_one_output_and_replaces_it(monkeypatch, capsys):
    shown, updates = [], []
    handle = types.SimpleNamespace(update=lambda content, raw: updates.append(content))
    shell = type("ZMQInteractiveShell", (), {})()
    package = types.ModuleType("IPython")
    package.get_ipython = lambda: shell
    package.display = types.ModuleType("IPython.display")
    package.display.display = lambda content, raw, display_id: shown.append(content) or handle
    monkeypatch.setitem(sys.modules, "IPython", package)
    monkeypatch.setitem(sys.modules, "IPython.display", package.display)
    run(KonicFinetuningCallback())
    assert len(shown) == len(updates) == 1  # the run took less than a second
    assert " ended ─╯" in updates[0]["text/plain"] and "0.423" in updates[0]["text/plain"]
    assert capsys.readouterr().out.startswith(BANNER + FIRST_LINE + "\n")
