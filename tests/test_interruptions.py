"""What reaches a run from outside: Ctrl-C in user code, a closed terminal, broken output, rewards that change data."""

import errno
import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

import warm
from command import konic_here, script
from conftest import PROMPTS
from konic.finetuning import (
    BaseKonicFinetuningCallback,
    DatasetConfig,
    KonicFinetuningCallback,
    KonicLLMRewardComposer,
    RewardError,
    llm_reward,
)
from konic.finetuning.run.saving import Saver
from konic.output import is_terminal, write_line
from test_engine import Silent, make_engine, metrics


@pytest.fixture(autouse=True)
def _ctrl_c_arrives():
    """Also where the tests run in the background of a shell, which ignores Ctrl-C there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Press(BaseKonicFinetuningCallback):
    """Sends signals to this process, a moment after a hook of an iteration."""

    def __init__(self, iteration, *times, number=signal.SIGINT):
        self.iteration, self.times, self.number, self.count = iteration, times, number, 0

    def on_iteration_begin(self, iteration):
        self.count = iteration
        if iteration == self.iteration:
            for delay in self.times:
                threading.Timer(delay, os.kill, (os.getpid(), self.number)).start()


class Swallows(KonicLLMRewardComposer):
    @llm_reward
    def judged(self, prompt, response):
        try:
            time.sleep(0.05)
            return float(len(response))
        except:  # noqa: E722
            return -99.0


def test_a_ctrl_c_that_a_reward_swallows_ends_the_run_and_teaches_nothing(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path, [Silent(), Press(3, 0.2)], composer=Swallows())
    result = engine.train(6)
    assert (result.stopped_because, result.total_iterations) == ("interrupted", 2)
    assert all(row["reward_min"] >= 0 for row in metrics(tmp_path))


class SwallowsInHook(Silent):
    """A callback that catches everything, in one of its hooks."""

    def __init__(self, hook):
        super().__init__()
        self.seen = []
        setattr(self, hook, self.swallow)

    def swallow(self, *_):
        self.seen.append(1)
        if len(self.seen) == 2:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except:  # noqa: E722
                pass


@pytest.mark.parametrize("hook", ["on_generation_begin", "on_reward_computed", "on_iteration_end", "should_stop_early"])
def test_a_ctrl_c_that_a_callback_swallows_ends_the_run(model_folders, tmp_path, hook):
    result = make_engine(model_folders["llama"], tmp_path, SwallowsInHook(hook)).train(4)
    done = 2 if hook in ("on_iteration_end", "should_stop_early") else 1
    assert (result.stopped_because, result.total_iterations) == ("interrupted", done)


def test_a_ctrl_c_swallowed_in_an_evaluation_leaves_no_evaluation(model_folders, tmp_path):
    class Interrupted(KonicLLMRewardComposer):
        @llm_reward(batch=True)
        def judged(self, prompts, responses):
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
            except:  # noqa: E722
                return [-99.0] * len(responses)

    engine = make_engine(model_folders["llama"], tmp_path, composer=Interrupted(), eval_every=1)
    assert engine.train(4).stopped_because == "interrupted"
    assert not list((tmp_path / "evaluations").glob("*"))


SWALLOW = """
    import os, signal, time
    from konic.finetuning import *

    def swallow():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except BaseException:
            pass

    class Rewards(KonicLLMRewardComposer):
        @llm_reward
        def one(self, prompt, response):
            {in_reward}
            return 1.0

    {at_load}
"""


@pytest.mark.parametrize("place", ["in_reward", "at_load"])
def test_a_ctrl_c_swallowed_while_rewards_are_tried_ends_the_command(tmp_path, place):
    path = script(tmp_path, SWALLOW.format(**{"in_reward": "", "at_load": "", place: "swallow()"}))
    texts = script(tmp_path, '{"prompt": "a", "response": "b"}', "texts.jsonl")
    run = konic_here("rewards", path, "--texts", texts)
    assert (run.returncode, run.stdout) == (130, "")


@pytest.mark.parametrize("method", ["generate", "evaluate"])
def test_a_ctrl_c_swallowed_by_the_prompts_ends_the_call(model_folders, tmp_path, method):
    def prompts():
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        except BaseException:
            yield "why"

    with pytest.raises(KeyboardInterrupt):
        getattr(make_engine(model_folders["llama"], tmp_path), method)(prompts())


def test_an_interrupted_demo_ends_with_the_code_of_an_interruption():
    interrupted = SimpleNamespace(stopped_because="interrupted", model_path=None, before=None, after=None)
    with mock.patch("konic.finetuning.KonicFinetuningEngine.train", return_value=interrupted):
        run = konic_here("demo")
    assert (run.returncode, run.stdout) == (130, "")


def test_what_a_second_ctrl_c_kept_from_being_saved_is_not_called_saved(
    model_folders, tmp_path, monkeypatch, capsys, caplog
):
    def interrupted(self, result):
        raise KeyboardInterrupt

    monkeypatch.setattr(Saver, "final", interrupted)
    result = make_engine(model_folders["llama"], tmp_path, KonicFinetuningCallback()).train(2)
    assert result.model_path is None
    assert "Saved in" not in capsys.readouterr().out
    assert "final/ was not written; there is no checkpoint." in caplog.text


CHILD = """
    import sys
    sys.path.insert(0, {tests!r})
    from test_engine import make_engine
    from test_interruptions import Press
    from konic.finetuning import KonicFinetuningCallback
    import signal, pathlib
    engine = make_engine({model!r}, pathlib.Path({run!r}), [KonicFinetuningCallback(), {more}])
    engine.train(4)
    print("after", file=sys.stderr)
"""


def child(model_folders, run, more, **options):
    text = textwrap.dedent(CHILD).format(
        tests=os.path.dirname(__file__), model=model_folders["llama"], run=str(run), more=more
    )
    return warm.Popen(
        [sys.executable, "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_terminal_that_closes_saves_the_run_before_the_process_ends(model_folders, tmp_path):
    process = child(
        model_folders, tmp_path / "run", "Press(3, 0.0, number=signal.SIGHUP)",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup
    )  # fmt: skip
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGHUP, errors
    assert "after" not in errors
    assert (tmp_path / "run" / "final").is_dir()
    assert (
        make_engine(model_folders["llama"], tmp_path / "run").train(4, resume_from_checkpoint=True).total_iterations
        == 4
    )


def test_under_nohup_a_closed_terminal_changes_nothing(model_folders, tmp_path):
    process = child(
        model_folders, tmp_path / "run", "Press(2, 0.0, number=signal.SIGHUP)",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert len(metrics(tmp_path / "run")) == 4


def test_a_reader_that_goes_away_does_not_stop_the_run(model_folders, tmp_path):
    process = child(model_folders, tmp_path / "run", "Press(99)")
    process.stdout.readline()
    process.stdout.close()
    with process.stderr as stream:
        errors = stream.read()
    assert process.wait(timeout=120) == 0, errors
    assert "after" in errors and "Error" not in errors
    assert (tmp_path / "run" / "final").is_dir()


def test_an_ascii_terminal_shows_what_it_can(model_folders, tmp_path):
    run = tmp_path / "é"
    process = child(model_folders, run, "Press(99)", env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"})
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"Saved in: {tmp_path}/?/final" in output


class Tee:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize("stream", [None, Tee()])
def test_streams_that_are_replaced_or_missing_are_no_terminals(model_folders, tmp_path, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "stdout", stream)
    make_engine(model_folders["llama"], tmp_path, KonicFinetuningCallback(log_samples=True)).train(1)
    if stream is not None:
        assert "[Iter    1] Reward:" in stream.text


def test_a_line_is_written_where_it_can_be_and_dropped_where_not():
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None, object()):
        write_line("x", stream)
        assert not is_terminal(stream)
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    write_line("é ok", ascii_only)
    assert ascii_only.buffer.getvalue() == b"? ok\n"


class Leaves(Silent):
    def on_iteration_end(self, result):
        if result.iteration == 2:
            os.chdir("/")
            sys.exit(7)


def test_a_callback_that_exits_is_named_and_what_is_done_is_saved(model_folders, tmp_path, caplog):
    before = os.getcwd()
    engine = make_engine(model_folders["llama"], tmp_path, Leaves())
    with pytest.raises(SystemExit) as left:
        engine.train(4)
    assert left.value.code == 7
    assert "Callback 'Leaves' called sys.exit(): what is done is saved" in caplog.text
    assert os.getcwd() == before
    assert (tmp_path / "checkpoint-2").is_dir()


class Broken:
    """A stream to a full disk, or an object of the user's that fails in its own way."""

    def __init__(self, error):
        self.error = error

    def write(self, text=""):
        raise self.error

    flush = isatty = fileno = write


class Prints(KonicLLMRewardComposer):
    @llm_reward
    def judged(self, prompt, response):
        print("scoring", response)
        print("scoring", response, file=sys.stderr, flush=True)
        return float(len(response))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("not yet set up")])
def test_output_that_breaks_stops_neither_a_run_nor_a_reward_that_prints(model_folders, tmp_path, monkeypatch, error):
    streams = Broken(error), Broken(error)
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    engine = make_engine(model_folders["llama"], tmp_path, KonicFinetuningCallback(log_samples=True), composer=Prints())
    result = engine.train(2)
    assert (sys.stdout, sys.stderr) == streams
    assert result.total_iterations == 2
    assert not any(row.num_reward_errors for row in result.history)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_command_whose_output_is_full_keeps_its_exit_code():
    konic = str(Path(sys.executable).with_name("konic"))
    with open("/dev/full", "w") as full:
        for arguments, code in ((["--version"], 0), (["train", "nothing.py"], 1)):
            assert subprocess.run([konic, *arguments], stdout=full, stderr=full, timeout=60).returncode == code


class Appends(KonicLLMRewardComposer):
    @llm_reward
    def judged(self, prompt, response, messages, tags):
        messages.append({"role": "assistant", "content": response})
        messages[0]["content"] = "changed"
        tags.pop()
        return float(len(messages) + len(tags))

    @llm_reward(batch=True)
    def all_at_once(self, prompts, responses, tags):
        for own in tags:
            own.clear()
        return [float(len(own)) for own in tags]


@pytest.mark.parametrize("workers", [0, 1])
def test_rewards_get_copies_as_deep_as_the_data(model_folders, tmp_path, workers):
    rows = [{"prompt": [{"role": "user", "content": text}], "tags": ["a", "b"]} for text in PROMPTS if len(text) < 9]
    seen = []

    class See(Silent):
        def on_generation_begin(self, prompts):
            seen.extend(prompts)

    engine = make_engine(
        model_folders["llama"], tmp_path, See(), composer=Appends(), dataset=DatasetConfig(prompts=rows),
        reward_workers=workers,
    )  # fmt: skip
    assert engine.train(3).get_reward_curve() == [3.0, 3.0, 3.0]
    assert set(seen) == {text for text in PROMPTS if len(text) < 9}


def test_a_column_named_messages_beside_plain_prompts_is_told_apart_from_a_chat(model_folders, tmp_path):
    class Counts(KonicLLMRewardComposer):
        @llm_reward
        def count(self, prompt, response, messages):
            return float(len(messages))

    rows = [{"prompt": f"p{n}", "messages": ["m"]} for n in range(16)]
    engine = make_engine(model_folders["llama"], tmp_path, composer=Counts(), dataset=DatasetConfig(prompts=rows))
    with pytest.raises(RewardError, match=r"'messages', the chat of a prompt, but the prompts are plain text"):
        engine.train(1)


def test_a_column_that_some_rows_lack_is_none_there(model_folders, tmp_path):
    class Right(KonicLLMRewardComposer):
        @llm_reward
        def right(self, prompt, response, answer):
            return None if answer is None else 1.0

    rows = [{"prompt": f"p{n}", **({"answer": "x"} if n % 5 == 4 else {})} for n in range(40)]
    data = DatasetConfig(prompts=rows, shuffle=False)
    history = make_engine(model_folders["llama"], tmp_path, composer=Right(), dataset=data).train(5).history
    assert [result.num_unscored for result in history] == [7, 6, 7, 6, 6]


def test_a_command_that_ctrl_c_ends_has_saved_and_says_so_by_its_exit_code(model_folders, tmp_path):
    script = tmp_path / "agent.py"
    script.write_text(
        textwrap.dedent(f"""
        from konic.finetuning import *

        class Rewards(KonicLLMRewardComposer):
            @llm_reward
            def brief(self, prompt, response):
                return -len(response) / 80

        agent = KonicFinetuningAgent(
            base_model={model_folders["llama"]!r}, reward_composer=Rewards(), lora_config=LoraConfig(r=2),
            dataset_config=DatasetConfig(prompts=["a", "b", "c"]),
            generation_config=GenerationConfig(max_new_tokens=4, max_prompt_length=16),
        )
        """)
    )
    command = [
        os.path.join(os.path.dirname(sys.executable), "konic"),
        "train",
        str(script),
        "--max-iterations",
        "100000",
    ]
    process = subprocess.Popen(
        [*command, "--output", str(tmp_path / "run")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    while "[Iter" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Stopped early: interrupted" in output
    assert f"The same command with --output {tmp_path / 'run'} --resume goes on from here.\n" in errors
    assert (tmp_path / "run" / "final").is_dir()


class Breaks(KonicLLMRewardComposer):
    @llm_reward
    def judged(self, prompt, response):
        raise ValueError("the cause")


@pytest.mark.parametrize("error", [Exception("No space left on device (os error 28)"), MemoryError("full")])
def test_what_fails_after_an_error_does_not_hide_it(model_folders, tmp_path, monkeypatch, caplog, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(Saver, "best", fails)
    engine = make_engine(model_folders["llama"], tmp_path, composer=Breaks(), on_reward_error="raise")
    with pytest.raises(RewardError, match="the cause"):
        engine.train(1)
    assert f"After the error below, this failed too: {type(error).__name__}: {error}" in caplog.text
