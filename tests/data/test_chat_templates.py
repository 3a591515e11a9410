"""A chat template is a stranger's program: it runs elsewhere, in bounds, and gives what the tokenizer itself gives."""

import dataclasses
import enum
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from transformers.utils import chat_template_utils

from conftest import CHAT_TEMPLATE, byte_tokenizer
from konic.finetuning.data import chat_templates
from konic.finetuning.data.chat_templates import render_chat
from konic.finetuning.data.prompts import Prompt
from konic.finetuning.data.tokenization import encode_prompt
from konic.finetuning.errors import ModelError

CHAT = [{"role": "user", "content": "hi"}]
NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (NESTED, "longer than 0.5 s"),
        ("{% set x = 9 ** (9 ** 9) %}", "longer than 0.5 s"),
        ("{{ 'a' * 10 ** 11 }}", "more than 268 MB"),
        ("{{ '%100000000000d' | format(1) }}", "more than 268 MB|precision"),
        ("{{ 'a' | center(10 ** 11) }}", "more than 268 MB"),
        (DOUBLING, "more than 268 MB"),
        ("{% for i in range(99999) %}{{ 'a' * 100 }}{% endfor %}", "makes 9999900 characters"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "RecursionError"),
        ("{{ raise_exception('no\nRun: pip install evil \x1b[2J') }}", r"no\\nRun: .* \\x1b"),
    ],
)
def test_a_chat_template_has_little_time_memory_and_room(template, problem, monkeypatch):
    monkeypatch.setattr(chat_templates, "SECONDS", 0.5)
    tokenizer = byte_tokenizer("llama")
    tokenizer.chat_template = template
    with pytest.raises(ModelError, match=rf"^Row 4: The tokenizer's chat template fails: [^\n]*({problem})[^\n]*$"):
        encode_prompt(Prompt(4, CHAT), tokenizer, 100)
    tokenizer.chat_template = CHAT_TEMPLATE
    assert encode_prompt(Prompt(4, CHAT), tokenizer, 100)


@dataclasses.dataclass
class Place:
    name: str
    at: tuple


class Kind(str, enum.Enum):  # noqa: UP042 - prints differently from StrEnum
    LOUD = "loud"


PLAIN_VALUES = (
    "é\n'", "\ud800", 1, 2**70, 0.1, float("nan"), True, None, ["a", {"b": None}], ("a", 1), {1: "a", "b": {}},
)  # fmt: skip
VALUES = (
    *PLAIN_VALUES,
    Kind.LOUD, np.float32(0.1), np.bool_(False), np.str_("n"), np.arange(2), Place("x", (1,)), b"bytes", object(),
    signal.SIGINT,
)  # fmt: skip


def test_a_chat_is_rendered_as_by_the_tokenizer_itself():
    tokenizer = byte_tokenizer("llama")
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m }}{{ m.extra }}{{ m.reasoning_content }}{% endfor %}"
        "{{ tools | tojson }}{{ words }}{{ strftime_now('%Y') }}{{ add_generation_prompt }}{{ nothing is defined }}"
    )
    values = {"tools": [{"name": "f"}], "words": ["a", 1, 0.5, None], "add_generation_prompt": True}
    shows_plain_values = hasattr(chat_template_utils, "_plain_template_data")  # as konic does with any transformers
    for extra in VALUES if shows_plain_values else PLAIN_VALUES:
        chat = [{"role": "user", "content": "é\n'", "thinking": "hm", "tool_calls": None, "extra": extra}]
        present = [{name: value for name, value in chat[0].items() if value is not None}]
        given = chat if shows_plain_values else present  # later versions drop what is None by themselves
        assert render_chat(chat, tokenizer, values) == tokenizer.apply_chat_template(given, tokenize=False, **values)


def test_the_process_is_started_once_and_again_after_it_was_killed():
    tokenizer, child = byte_tokenizer("llama"), chat_templates._child
    render_chat(CHAT, tokenizer, {})
    first = child._process
    render_chat(CHAT, tokenizer, {})
    assert child._process is first
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert render_chat(CHAT, tokenizer, {}) == "[user]hi"
    assert child._process is not first


def test_a_process_that_cannot_start_is_one_error(monkeypatch):
    chat_templates._child.end()
    monkeypatch.setattr(sys, "path", [])  # so that it finds no transformers
    monkeypatch.setattr(sys, "executable", sys.base_prefix + "/bin/python3")
    with pytest.raises(ModelError, match=r"its process cannot start: code 1"):
        render_chat(CHAT, byte_tokenizer("llama"), {})


SCRIPT = """
import os, signal, sys, threading, time
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from konic.finetuning.data import chat_templates
from konic.finetuning.data.chat_templates import _child, render_chat

signal.signal(signal.SIGPROF, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGPROF])
tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
chat = [{"role": "user", "content": "hi"}]
assert render_chat(chat, tokenizer, {}) == "[user]hi"
print(_child._process.pid, flush=True)
print("SECRET" in Path(f"/proc/{_child._process.pid}/environ").read_text(), flush=True)

def hold_lock():
    with _child._lock:
        time.sleep(1)

threading.Thread(target=hold_lock).start()
time.sleep(0.1)
reader, writer = os.pipe()
pid = os.fork()  # while another thread renders
if pid == 0:
    print(render_chat(chat, tokenizer, {}), _child._process.pid, flush=True)
    os.write(writer, b"begins")
chat_templates.SECONDS = 0.3
tokenizer.chat_template = sys.argv[2]
if pid == 0:
    render_chat(chat, tokenizer, {})
os.read(reader, 6)
time.sleep(0.2)
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    render_chat(chat, tokenizer, {})
except KeyboardInterrupt:
    print(_child._process)
tokenizer.chat_template = "{{ 1 }}"
print(render_chat(chat, tokenizer, {}), _child._process.pid)
"""


def has_ended(pid, seconds=10):
    """True when there is no such process but a zombie whose parent is gone."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_the_process_belongs_to_one_process_and_ends_with_it(tmp_path):
    byte_tokenizer("llama").save_pretrained(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "SECRET_TOKEN": "hush"}
    command = [
        sys.executable,
        "-W",
        "error::ResourceWarning",
        "-W",
        "ignore::DeprecationWarning",
        "-c",
        SCRIPT,
        str(tmp_path),
        NESTED,
    ]
    script = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert (script.returncode, script.stderr) == (0, "")
    pid, has_secret, forked, interrupted, again = script.stdout.splitlines()
    assert (has_secret, forked[:8], interrupted, again[0]) == ("False", "[user]hi", "None", "1")
    pids = {int(line.split()[-1]) for line in (pid, forked, again)}
    assert len(pids) == 3
    assert all(map(has_ended, pids))


def test_a_variable_of_the_template_may_have_any_name():
    tokenizer = byte_tokenizer("llama")
    tokenizer.chat_template = "{{ seconds }} {{ messages[0].content }}"
    assert render_chat(CHAT, tokenizer, {"seconds": 1000.0}) == "1000.0 hi"
