"""`konic export --push-to-hub`, against a Hub on loopback: what arrives, for whom, and what is never sent."""

import json
import os
import shutil
import subprocess
import sys

import huggingface_hub
import pytest

from command import konic_here
from konic.export import push as push_module
from konic.export.push import files_to_send
from konic.export.saved import is_hub_id
from konic.finetuning.errors import OutputError
from loopback_hub import MEMBER_TOKEN, OUTSIDER_TOKEN, SIGNATURE, LoopbackHub
from test_engine import make_engine

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # huggingface_hub 2.4 sends so
REPO = "member/kind"
ADAPTER = {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json",
           "tokenizer_config.json"}  # fmt: skip
MERGED = {"README.md", "config.json", "generation_config.json", "model.safetensors", "chat_template.jinja",
          "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
KEY = "hf_" + "Q7w" * 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_folders):
    """The folder of a run with an adapter."""
    folder = tmp_path_factory.mktemp("push") / "run"
    make_engine(model_folders["llama"], folder).train(1)
    return folder


@pytest.fixture
def hub(monkeypatch):
    """A Hub which this process takes for the real one; files go there as for a user without Xet."""
    with LoopbackHub() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", MEMBER_TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


class Terminal:
    """A terminal at which somebody answers."""

    def __init__(self, answer):
        self.answer = answer

    def isatty(self):
        return True

    def readline(self):
        return self.answer


def push(run, output, *options, repo=REPO):
    return konic_here("export", run, "--output", output, "--push-to-hub", repo, *options)


def arrived(hub, repo=REPO):
    """What the Hub has: {path: bytes}, without what it makes by itself."""
    files = hub.repos["models", repo].at("main")[1]
    return {name: file.content for name, file in files.items() if name != ".gitattributes"}


def of_a_hub_base(trained, folder):
    """A run whose base model is said to come from the Hub."""
    shutil.copytree(trained, folder)
    config = folder / "final" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "org/base"}))
    return folder


def test_what_arrives_is_the_export_and_private(trained, tmp_path):
    """The command as it is, in a process of its own that knows the Hub by HF_ENDPOINT alone."""
    with LoopbackHub() as hub:
        environment = hub.environment(tmp_path / "home", token=MEMBER_TOKEN) | {"HF_HUB_DISABLE_XET": "1"}
        command = ["export", trained, "--output", tmp_path / "out", "--push-to-hub", REPO, "--yes"]
        code = "from konic.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, command)],
            env=environment, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert arrived(hub) == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert set(arrived(hub)) == MERGED
        assert hub.repos["models", REPO].private and not hub.outside
        assert [path for _, path in hub.requests if "/commit/" in path] == [f"/api/models/{REPO}/commit/main"]
        card = arrived(hub)["README.md"].decode()
        assert "base_model:" not in card and str(tmp_path.parent) not in card
        assert f"{hub.url}/{REPO} (private, new)" in done.stdout and f"Sent: {hub.url}/{REPO}/commit/" in done.stdout
        assert SIGNATURE not in done.stdout + done.stderr and MEMBER_TOKEN not in done.stdout + done.stderr


def test_an_adapter_arrives_without_what_else_lies_in_the_run(trained, hub, tmp_path):
    run = of_a_hub_base(trained, tmp_path / "run")
    for name in ("completions.jsonl", "run.json", "trainer_state.json", "optimizer.pt", "notes.txt"):
        (run / "final" / name).write_text("{}")
    done = push(run, tmp_path / "out", "--format", "adapter", "--yes", "--public")
    assert done.returncode == 0, done.stderr
    assert set(arrived(hub)) == ADAPTER and not hub.repos["models", REPO].private
    assert "base_model: org/base" in arrived(hub)["README.md"].decode()
    again = push(run, tmp_path / "again", "--format", "adapter", "--yes", "--public")
    assert again.returncode == 0 and "exists: files of the same names are replaced" in again.stdout


def test_a_gguf_file_arrives_with_its_modelfile(trained, hub, tmp_path, monkeypatch):
    from konic.export import folders

    def written(saved, folder, dtype):
        folder.mkdir()
        for name in ("model-f16.gguf", "Modelfile", "README.md"):
            (folder / name).write_text("FROM ./model-f16.gguf\n")
        return []

    monkeypatch.setattr(folders, "write_gguf_folder", written)
    assert push(trained, tmp_path / "out", "--format", "gguf", "--yes").returncode == 0
    assert set(arrived(hub)) == {"model-f16.gguf", "Modelfile", "README.md"}


def test_only_files_of_known_names_are_sent_and_no_links_or_folders(tmp_path):
    folder, secret = tmp_path / "out", tmp_path / "secret"
    (folder / "additional_chat_templates").mkdir(parents=True)
    secret.write_text("mine")
    sent = {"README.md", "config.json", "model-00001-of-00002.safetensors", "model-q8_0.gguf", "tokenizer.model"}
    for name in sent:
        (folder / name).write_text("{}")
    left = ["run.json", "completions.jsonl", "metrics.jsonl", "optimizer.pt", "training_args.bin", ".env", "x.py"]
    for name in left:
        (folder / name).write_text("{}")
    (folder / "chat_template.jinja").symlink_to(secret)
    (folder / "model.safetensors").symlink_to(secret)
    os.mkfifo(folder / "merges.txt")
    (folder / "vocab.txt").mkdir()
    files, kept = files_to_send(folder, [])
    assert {file.name for file in files} == sent
    names = {"additional_chat_templates", "chat_template.jinja", "model.safetensors", "merges.txt", "vocab.txt"}
    assert set(kept) == {*left, *names}


def test_a_file_that_changes_after_it_was_looked_at_is_not_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(push_module, "_HEAD", 10)
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        (tmp_path / name).write_text("looked at" if name != "model.safetensors" else "is larger than a head")
    files, _ = files_to_send(tmp_path, [])
    secret = tmp_path / "secret"
    secret.write_text("mine")
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to(secret)
    sent = {file.name: file.content for file in files}
    assert (sent["config.json"], sent["tokenizer.model"]) == (b"looked at", b"looked at")
    changed = next(file for file in files if file.name == "model.safetensors")
    with pytest.raises(OutputError, match=r"model\.safetensors: has changed since it was looked at\. Nothing was sent"):
        push_module._to_add(changed)


SECRETS = {
    "tokenizer_config.json": (f'{{\n "note": "{KEY}"\n}}', 2),
    "config.json": ('{\n\n "api_key": "Nobody7knows9it"\n}', 3),
    "chat_template.jinja": ("{# https://me:hunter2pass@host/x #}", 1),
    "tokenizer.json": (f'{{\n "&page=": 1,\n "{KEY}": 2\n}}', 3),
    "README.md": ("a\nb\n-----BEGIN PRIVATE KEY-----\nMIIE\n-----END PRIVATE KEY-----\n", 3),
    "Modelfile": ('FROM ./x\nSYSTEM "Bearer abcdefghij"', 2),
    "adapter_config.json": ('{"revision": "of 9my8own7 environment"}', 1),
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_in_a_file_is_named_by_its_line_and_not_shown(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "9my8own7")
    text, line = SECRETS[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(OutputError) as refused:
        files_to_send(tmp_path, [])
    assert f"{name}, line {line}: holds what looks like a secret" in str(refused.value)
    assert not any(secret in str(refused.value) for secret in (KEY, "Nobody7", "hunter2", "MIIE", "abcdefghij", "9my8"))


def test_a_secret_in_the_header_of_a_gguf_file_is_found(tmp_path):
    (tmp_path / "model-f16.gguf").write_bytes(b"GGUF\xff\x00" * 50 + f" {KEY} ".encode() + b"\xff" * 50)
    with pytest.raises(OutputError, match=r"model-f16.gguf, in its header: holds what looks like a secret"):
        files_to_send(tmp_path, [])


def test_a_folder_of_this_machine_in_a_file_is_found_and_a_token_of_a_vocabulary_is_none(tmp_path):
    home = tmp_path / "hömé" / "me"
    for name, text in (("config.json", json.dumps({"a": f"{home}/x"})), ("chat_template.jinja", f"\n{home}")):
        (tmp_path / name).write_text(text)
        with pytest.raises(OutputError, match=f"{name}, line {1 + text.count(chr(10))}: .* a folder of yours"):
            files_to_send(tmp_path, [home])
        (tmp_path / name).unlink()
    vocabulary = '{"/root": 1, "&page=": 2, "token=": "[=:]x"}'
    (tmp_path / "tokenizer.json").write_text(vocabulary)
    (tmp_path / "tokenizer_config.json").write_text('{\n "pad_token": "padding",\n "eos_token": "</s>"\n}')
    (tmp_path / "config.json").write_text(f'{{"a": "{home}-other", "b": "x{home}"}}')
    assert len(files_to_send(tmp_path, [home, home.parents[-1] / "root"])[0]) == 3


def test_only_a_name_of_the_hub_is_a_base_model_for_others(tmp_path):
    """The folder may be of another machine, or gone."""
    names = (
        "/gone/model",
        "./model",
        "~/model",
        "C:\\\\model",
        "a/b/c",
        "model.gguf",
        "runs/kind",
        "smollm2-135m",
        str(tmp_path),
    )
    assert not any(map(is_hub_id, names))
    assert is_hub_id("org/name") and is_hub_id("gpt2")


def test_a_run_that_trained_every_weight_has_no_adapter_to_send(trained, hub, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    (run / "final" / "adapter_config.json").unlink()
    (run / "final" / "config.json").write_text("{}")
    done = push(run, tmp_path / "out", "--format", "adapter", "--yes")
    assert done.returncode == 1 and "trained every weight" in done.stderr and not hub.repos


def test_a_secret_in_the_model_of_a_run_stops_before_anything_is_sent(trained, hub, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = run / "final" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"note": KEY}))
    done = push(run, tmp_path / "out", "--yes")
    assert done.returncode == 1 and "tokenizer_config.json, line" in done.stderr and KEY not in done.stderr
    assert not hub.repos and not any(method in ("PUT", "POST") for method, _ in hub.requests)


def test_paths_of_this_machine_are_taken_out_of_configs_and_card(trained, hub, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = run / "final" / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"note": f"from {run}/final/x.json, by me"}))
    record = json.loads((run / "run.json").read_text())
    record["settings"]["dataset_config"]["split"] = f"see {run}/rows.csv"
    (run / "run.json").write_text(json.dumps(record))
    done = push(run, tmp_path / "out", "--yes")
    assert done.returncode == 0, done.stderr
    assert not any(str(tmp_path).encode() in content for content in arrived(hub).values())
    assert json.loads(arrived(hub)["tokenizer_config.json"])["note"] == "from x.json, by me"
    assert "see rows.csv" in arrived(hub)["README.md"].decode()


@pytest.mark.parametrize("answer", ["", "\n", "n\n", "yep\n"])
def test_without_a_yes_nothing_is_sent(answer, trained, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    run = of_a_hub_base(trained, tmp_path / "run")
    done = push(run, tmp_path / "out", "--format", "adapter")
    assert done.returncode == 0 and "Nothing was sent" in done.stdout and (tmp_path / "out").is_dir()
    assert f"{hub.url}/{REPO} (private, new)" in done.stdout and "adapter_model.safetensors " in done.stdout
    assert not hub.repos and {method for method, _ in hub.requests} == {"GET"}


def test_a_yes_sends(trained, hub, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    run = of_a_hub_base(trained, tmp_path / "run")
    assert push(run, tmp_path / "out", "--format", "adapter").returncode == 0
    assert set(arrived(hub)) == ADAPTER


def test_what_cannot_be_sent_is_one_error_before_anything_is_written(trained, hub, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def refused(told, *options, repo=REPO, code=1):
        done = push(trained, out, *options, repo=repo)
        assert done.returncode == code and told in " ".join(done.stderr.replace("│", " ").split()), done.stderr
        assert "Traceback" not in done.stderr and not out.exists()
        assert not any(method in ("PUT", "POST") for method, _ in hub.requests)

    for name in ("kind", "a/b/c", "a/", "/b", "a b/c", "a/b--c", "a/b.git", "../x", "a/" + "b" * 99, "a/b\x1b"):
        refused("is no name of a repo", "--yes", repo=name)
    refused("standard input is no terminal", code=2)
    refused("Send --format merged", "--yes", "--format", "adapter")
    hub.add_model("member/open", trained / "final")
    refused("is public already", "--yes", repo="member/open")
    hub.repos["models", "member/open"].private = True
    refused("is private already", "--yes", "--public", repo="member/open")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused("does not know the access token", "--yes")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("the Hub cannot be reached", "--yes")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN")
    refused("there is no access token", "--yes")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set", "--yes")
    for option in ("--public", "--yes"):
        assert konic_here("export", trained, "--output", out, option).returncode == 2


def test_what_the_hub_refuses_is_one_error_without_tokens_and_signed_addresses(trained, hub, tmp_path, monkeypatch):
    run = of_a_hub_base(trained, tmp_path / "run")
    hub.fail_with("uploads", 400)
    failed = push(run, tmp_path / "out", "--format", "adapter", "--yes")
    monkeypatch.setenv("HF_TOKEN", OUTSIDER_TOKEN)
    forbidden = push(run, tmp_path / "out2", "--format", "adapter", "--yes")
    for done, told in ((failed, "the Hub refused"), (forbidden, "may not write there")):
        assert done.returncode == 1 and told in done.stderr, done.stderr
        assert not any(text in done.stderr for text in (SIGNATURE, MEMBER_TOKEN, OUTSIDER_TOKEN, "Traceback"))
    assert hub.repos["models", REPO].private and not arrived(hub)
