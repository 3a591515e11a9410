"""The loopback hub, asked by the real clients: each child process is a fresh start with its own caches."""

import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from conftest import byte_tokenizer, tiny_model
from loopback_hub import CARD, MEMBER_TOKEN, OUTSIDER_TOKEN, LoopbackHub

ROWS = {"plain_text/train": 3000, "plain_text/test": 20, "short/train": 5}
START = """
import json, time
time.sleep = lambda seconds: None  # the clients wait between tries
results = {}
def note(name, call):
    try:
        results[name] = call()
    except Exception as error:
        chain = []
        while error is not None:
            chain.append(f"{type(error).__module__}.{type(error).__name__}")
            error = error.__cause__
        results[name] = chain
"""
END = "\nprint('RESULTS' + json.dumps(results))\n"


def run_child(code, hub, home, **options):
    """What the code noted, run where only the hub can be reached."""
    environment = hub.environment(home, **options) | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", START + code + END]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.partition("RESULTS")[2])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dataset of two subsets and a GPT-2, as folders."""
    root = tmp_path_factory.mktemp("repos")
    for name, count in ROWS.items():
        path = root / "imdb" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table({"text": [f"{name} {i}" for i in range(count)], "label": [i % 2 for i in range(count)]})
        pq.write_table(table, path, row_group_size=500)
    (root / "imdb" / "README.md").write_text(CARD)
    tiny_model("gpt2", torch.float32).save_pretrained(root / "gpt2")
    byte_tokenizer("gpt2").save_pretrained(root / "gpt2")
    return root


@pytest.fixture
def hub(folders):
    with LoopbackHub() as hub:
        hub.add_dataset("stanfordnlp/imdb", folders / "imdb", aliases=["imdb"])
        hub.add_dataset("org/gated", folders / "imdb", gated=True)
        hub.add_model("openai-community/gpt2", folders / "gpt2", aliases=["gpt2"])
        yield hub


def test_huggingface_hub(hub, folders, tmp_path):
    sha = hub.repos["datasets", "stanfordnlp/imdb"].names["main"]
    hub.add_model("org/moving", folders / "imdb" / "short")
    first = hub.repos["models", "org/moving"].names["main"]
    second = hub.add_model("org/moving", folders / "imdb" / "plain_text")
    hub.break_downloads("plain_text/test-00000-of-00001.parquet")
    hub.fail_with("plain_text/train-00000-of-00001.parquet", 503)
    code = f"""
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()
def fetch(file, repo="imdb", **options):
    return hf_hub_download(repo, file, repo_type="dataset", **options)
info = api.dataset_info("imdb")
results["info"] = [info.id, info.sha, info.gated, info.card_data.configs[1]["config_name"]]
results["files"] = api.list_repo_files("imdb", repo_type="dataset")
results["tree"] = [entry.path for entry in api.list_repo_tree("imdb", repo_type="dataset")]
results["paths"] = [e.path for e in api.get_paths_info("imdb", ["short", "README.md", "no"], repo_type="dataset")]
results["refs"] = api.list_repo_refs("gpt2").branches[0].target_commit
results["readme"] = Path(fetch("README.md")).read_text()
results["large"] = Path(fetch("short/train-00000-of-00001.parquet")).stat().st_size
results["heads"] = [api.model_info("org/moving").sha, api.model_info("org/moving", revision="{first}").sha]
results["snapshot"] = sorted(path.name for path in Path(snapshot_download("org/moving", revision="{first}")).iterdir())
results["repo exists"] = [api.repo_exists("gpt2"), api.repo_exists("no/such")]
note("gated", lambda: fetch("README.md", "org/gated"))
note("outsider", lambda: fetch("README.md", "org/gated", token="{OUTSIDER_TOKEN}"))
results["member"] = Path(fetch("README.md", "org/gated", token="{MEMBER_TOKEN}")).read_text()
results["large member"] = Path(fetch("short/train-00000-of-00001.parquet", "org/gated", token="{MEMBER_TOKEN}")).name
results["gated info"] = api.dataset_info("org/gated").gated
results["whoami"] = api.whoami(token="{MEMBER_TOKEN}")["name"]
note("wrong token", lambda: api.dataset_info("imdb", token="hf_wrong"))
note("unknown repo", lambda: fetch("README.md", "no/such"))
note("unknown repo, member", lambda: fetch("README.md", "no/such", token="{MEMBER_TOKEN}"))
note("unknown repo info", lambda: api.dataset_info("no/such"))
note("unknown revision", lambda: fetch("README.md", revision="v9"))
note("unknown revision info", lambda: api.dataset_info("imdb", revision="v9"))
note("unknown file", lambda: fetch("nowhere.txt"))
note("broken", lambda: fetch("plain_text/test-00000-of-00001.parquet"))
note("failing", lambda: fetch("plain_text/train-00000-of-00001.parquet"))
"""
    results = run_child(code, hub, tmp_path)
    assert results["info"] == ["stanfordnlp/imdb", sha, False, "short"]
    assert results["files"] == ["README.md", *sorted(f"{name}-00000-of-00001.parquet" for name in ROWS)]
    assert sorted(results["tree"]) == ["README.md", "plain_text", "short"]
    assert sorted(results["paths"]) == ["README.md", "short"]
    assert results["refs"] == hub.repos["models", "openai-community/gpt2"].names["main"]
    assert results["readme"] == results["member"] == CARD
    assert results["large"] == (folders / "imdb" / "short" / "train-00000-of-00001.parquet").stat().st_size
    assert results["heads"] == [second, first] and results["snapshot"] == ["train-00000-of-00001.parquet"]
    assert results["repo exists"] == [True, False]
    assert results["gated info"] == "auto" and results["whoami"] == "member"
    errors, status = "huggingface_hub.errors.", "httpx2.HTTPStatusError"
    assert results["gated"] == results["outsider"] == [errors + "GatedRepoError", status]
    assert results["wrong token"] == [errors + "HfHubHTTPError", status]
    for name in ("unknown repo", "unknown repo, member", "unknown repo info"):
        assert results[name] == [errors + "RepositoryNotFoundError", status]
    assert results["unknown revision"] == results["unknown revision info"] == [errors + "RevisionNotFoundError", status]
    assert results["unknown file"] == [errors + "RemoteEntryNotFoundError", status]
    assert results["broken"][0] == "httpx2.RemoteProtocolError"
    assert results["failing"] == [errors + "LocalEntryNotFoundError", errors + "HfHubHTTPError", status]
    assert ("GET", "/api/datasets/imdb") in hub.requests and ("GET", "/api/datasets/stanfordnlp/imdb") in hub.requests
    assert not hub.outside

    hub.repair()
    code = """
from huggingface_hub import hf_hub_download
results["path"] = hf_hub_download("imdb", "plain_text/test-00000-of-00001.parquet", repo_type="dataset")
"""
    repaired = run_child(code, hub, tmp_path)
    assert pq.read_table(repaired["path"]).num_rows == ROWS["plain_text/test"]


def test_datasets(hub, folders, tmp_path):
    code = f"""
from datasets import load_dataset
def load(repo, *arguments, **options):
    return load_dataset(repo, *arguments, **{{"split": "train"}} | options)
def texts(*arguments, **options):
    return list(load(*arguments, **options)["text"])
note("train", lambda: texts("stanfordnlp/imdb")[::1000])
note("test", lambda: len(texts("stanfordnlp/imdb", split="test")))
note("short", lambda: texts("stanfordnlp/imdb", "short"))
note("bare name", lambda: texts("imdb"))
note("gated", lambda: texts("org/gated"))
note("member", lambda: len(texts("org/gated", split="test", token="{MEMBER_TOKEN}")))
note("unknown", lambda: texts("no/such"))
note("unknown revision", lambda: texts("stanfordnlp/imdb", revision="v9"))
note("unknown subset", lambda: texts("stanfordnlp/imdb", "long"))
note("unknown split", lambda: texts("stanfordnlp/imdb", split="dev"))
"""
    results = run_child(code, hub, tmp_path)
    assert results["train"] == [f"plain_text/train {i}" for i in (0, 1000, 2000)]
    assert results["test"] == results["member"] == 20
    assert results["short"] == [f"short/train {i}" for i in range(5)]
    assert results["bare name"] == ["huggingface_hub.errors.HfUriError"]
    assert results["gated"] == results["unknown"] == ["datasets.exceptions.DatasetNotFoundError"]
    assert results["unknown revision"][0] == "datasets.exceptions.DatasetNotFoundError"
    assert results["unknown subset"] == results["unknown split"] == ["builtins.ValueError"]
    assert not hub.ranges
    assert {path.rpartition("/info")[0] or path for _, path in hub.outside} == {
        "s3.amazonaws.com:443",
        hub.url.replace("://", "://datasets-server."),
    }

    hub.requests.clear()
    code = """
from datasets import load_dataset
note("short", lambda: list(load_dataset("stanfordnlp/imdb", "short", split="train")["text"]))
note("unnamed", lambda: load_dataset("stanfordnlp/imdb", split="train").num_rows)
note("unknown", lambda: load_dataset("no/such"))
"""
    offline = run_child(code, hub, tmp_path, offline=True)
    assert offline["short"] == results["short"]
    assert offline["unnamed"] == ["builtins.ValueError"]  # the default subset is on the card, which is not asked
    assert offline["unknown"] == ["builtins.ConnectionError"]
    assert not hub.requests


def test_datasets_streaming(hub, folders, tmp_path):
    hub.break_downloads("plain_text/test-00000-of-00001.parquet")
    code = """
import itertools
from datasets import load_dataset
def first(split, name=None):
    rows = load_dataset("stanfordnlp/imdb", name, split=split, streaming=True)
    return [row["text"] for row in itertools.islice(rows, 3)]
note("train", lambda: first("train"))
note("short", lambda: first("train", "short"))
note("broken", lambda: first("test"))
"""
    results = run_child(code, hub, tmp_path)
    for name, subset in (("train", "plain_text"), ("short", "short")):
        assert results[name] == [f"{subset}/train {i}" for i in range(3)]
    assert results["broken"][:2] == ["builtins.ConnectionError", "httpx2.RemoteProtocolError"]
    assert {path.split("/")[0] for path, _ in hub.ranges} == {"plain_text", "short"}


def test_transformers(hub, folders, tmp_path):
    hub.add_model("org/locked", folders / "gpt2", gated=True)
    code = """
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("gpt2"), AutoModelForCausalLM.from_pretrained("gpt2")
results["ids"] = tokenizer("the film was")["input_ids"]
results["weights"] = [model.config.model_type, model.lm_head.weight.double().sum().item()]
"""
    failures = """
note("gated", lambda: AutoModelForCausalLM.from_pretrained("org/locked"))
note("unknown", lambda: AutoModelForCausalLM.from_pretrained("no/such"))
note("unknown revision", lambda: AutoModelForCausalLM.from_pretrained("gpt2", revision="v9"))
"""
    results = run_child(code + failures, hub, tmp_path)
    assert results["ids"] == byte_tokenizer("gpt2")("the film was")["input_ids"]
    weights = tiny_model("gpt2", torch.float32).lm_head.weight.double().sum().item()
    assert results["weights"] == ["gpt2", pytest.approx(weights)]
    for name, error in (
        ("gated", "Gated"),
        ("unknown", "RepositoryNotFound"),
        ("unknown revision", "RevisionNotFound"),
    ):
        assert results[name][0] == "builtins.OSError" and error in results[name][1]
    assert not hub.outside

    hub.requests.clear()
    offline = run_child(code, hub, tmp_path, offline=True)
    assert offline == {name: results[name] for name in ("ids", "weights")}
    assert not hub.requests

    hub.break_downloads("model.safetensors")
    broken = run_child(f"note('load', lambda: exec({code!r}))", hub, tmp_path / "fresh")
    assert broken["load"][:2] == ["builtins.OSError", "httpx2.RemoteProtocolError"]
