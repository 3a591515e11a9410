"""`konic chat`: answers with the chat so far as their prompt, commands, and what ends an answer or the chat."""

import io
import sys

import pytest
from test_generate import REWARDS

from command import konic_here, script
from konic.cli import conversation
from konic.finetuning import KonicFinetuningEngine
from konic.finetuning.data.tokenization import encode_prompt
from konic.saved.agents import SavedRun
from konic.saved.chat import next_prompt, with_room_for_chat
from konic.saved.weights import Weights
from test_engine import make_engine


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def run(request, tmp_path_factory, model_folders):
    folder = tmp_path_factory.mktemp("chat") / request.param
    make_engine(model_folders[request.param], folder, architecture=request.param).train(1)
    return folder


def chatted(run, *lines, options=(), monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    done = konic_here("chat", run, "--device", "cpu", "--max-new-tokens", 4, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_both_answer_each_line_and_commands_change_the_chat(run, tmp_path, monkeypatch):
    rewards = script(tmp_path, REWARDS, "rewards.py")
    lines = "hi", "/base", "you", "/foo", "/weights nothing", "/weights base", "/seed 7", "/reset", "hi", "/quit", "no"
    shown = chatted(run, *lines, options=("--rewards", rewards), monkeypatch=monkeypatch)
    before, after = shown.split("you: /base\n")
    assert "base: " in before and "final: " in before and before.count("  reward ") == 2
    assert after.startswith("The base is hidden.") and "\nfinal: " in after
    for said in ("There is no /foo.", "no weights 'nothing'", "base goes on with this chat.", "The seed is 7."):
        assert said in after
    assert "you: no" not in shown
    assert ("no chat template" in shown) == (run.name == "gpt2")


def test_answers_are_those_of_the_same_chat_and_long_ones_are_cut_with_a_word(run):
    """The turns stand in the prompt as the model's template, or plain text, puts them; the oldest leave first."""
    saved = SavedRun.read(run, {"max_new_tokens": 4})
    weights = with_room_for_chat(Weights.load("final", saved.agent("final"), "cpu"))
    room = weights.generation.max_prompt_length
    assert room == 124  # the model's 128 positions, less the response
    turns = [("a" * 30, "b" * 30), ("c", "d")]
    prompt, cut = next_prompt(weights, turns[1:], "e", None, {})
    text = weights.policy.tokenizer.decode(encode_prompt(prompt, weights.policy.tokenizer, room)[0])
    assert cut is None
    has_template = run.name == "llama"
    assert text == ("[user]c[assistant]d[user]e[assistant]" if has_template else "cd\ne")
    prompt, cut = next_prompt(weights, turns, "e" * 20, None, {})
    assert (cut is not None and "the first turn is left out" in cut) == has_template
    prompt, cut = next_prompt(weights, turns, "e" * 200, None, {})
    assert cut is not None and len(encode_prompt(prompt, weights.policy.tokenizer, room)[0]) <= room
    shown = []
    sample = weights.stream(prompt, 3, shown.append)
    assert shown[-1] == sample.response == weights.respond([prompt], 3)[0].response
    if not has_template:
        engine = KonicFinetuningEngine.from_agent(saved.agent("final"), device="cpu")
        assert (
            weights.respond([next_prompt(weights, [], "ab", None, {})[0]], 0)[0].response == engine.generate(["ab"])[0]
        )


def test_a_wide_terminal_shows_columns_and_ctrl_c_ends_one_answer(run, monkeypatch):
    monkeypatch.setattr(conversation, "is_terminal", lambda stream: True)
    monkeypatch.setenv("COLUMNS", "120")
    real, calls = Weights.stream, []

    def stream(self, prompt, seed, show):
        calls.append((self.name, prompt.content))
        if len(calls) == 1:
            show("cut off")
            raise KeyboardInterrupt
        return real(self, prompt, seed, show)

    monkeypatch.setattr(Weights, "stream", stream)
    shown = chatted(run, "hi", "more", monkeypatch=monkeypatch)
    headings = [line.split() for line in shown.splitlines() if "base" in line and "final" in line]
    assert headings[0] == ["base", "final"] and "cut off" in shown
    assert [name for name, _ in calls] == ["base", "final"] * 2
    assert "cut off" in str(calls[2][1]) and "cut off" not in str(calls[3][1])  # each goes on from its own answer


def test_the_base_keeps_the_turns_in_which_it_was_the_only_one(run, monkeypatch):
    calls = []

    def stream(self, prompt, seed, show):
        calls.append((self.name, str(prompt.content)))
        raise KeyboardInterrupt

    monkeypatch.setattr(Weights, "stream", stream)
    chatted(run, "first", "/weights base", "second", "/weights final", "third", monkeypatch=monkeypatch)
    assert [name for name, _ in calls] == ["base", "final", "base", "base", "final"]
    assert all(said in content for _, content in calls[3:] for said in ("first", "second", "third"))


def test_what_cannot_be_talked_to_is_one_error(run, tmp_path, monkeypatch):
    fails = script(tmp_path, REWARDS.replace("len(response)", "1 / 0"), "fails.py")
    shown = chatted(run, "hi", "you", options=("--rewards", fails), monkeypatch=monkeypatch)
    assert shown.count("ZeroDivisionError") >= 4  # and the chat goes on
    for arguments, said in (((tmp_path,), "no run.json"), ((run, "--weights", "x"), "no weights 'x'")):
        done = konic_here("chat", *arguments)
        assert done.returncode == 1 and said in done.stderr
