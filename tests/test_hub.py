"""The Hub for real: the clients as they are, against a stand-in on loopback that answers as the Hub does."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from conftest import byte_tokenizer, tiny_model
from konic.finetuning.hub import explain_hub_error
from loopback_hub import CARD, MEMBER_TOKEN, LoopbackHub

EXAMPLE = Path(__file__).parent.parent / "examples" / "sentiment_rlhf.py"
SENTENCES = ("The film was slow at first.", "I loved the music and the light.", "Nobody in it says a true word.",
             "The ending is good, the middle is not.", "My brother slept through half of it.")  # fmt: skip
START = """
import json, time
time.sleep = lambda seconds: None  # the clients wait between tries
from konic.finetuning import *
from konic.finetuning.data.prompts import load_prompts
from konic.finetuning.models.loading import load_model
import torch
results = {}
def note(name, call):
    try:
        results[name] = call()
    except KonicError as error:
        results[name] = f"{type(error).__name__}: {error}"
def dataset(**settings):
    rows = load_prompts(DatasetConfig(source=DatasetSource.HUGGINGFACE, prompt_column="text", **settings))
    return [[prompt.row, prompt.text] for prompt in rows.batch(0, 3)]
def model(name, **kwargs):
    loaded = load_model(name, kwargs, torch.device("cpu"))
    return [type(loaded.model).__name__, loaded.location]
"""
END = "\nprint('RESULTS' + json.dumps(results))\n"


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def review(number, sentences=300):
    """A long review, no two alike."""
    return f"Review {number}. " + " ".join(SENTENCES[(number + i * i) % 5] for i in range(sentences))


def bpe_gpt2(folder):
    """A small GPT-2 with a BPE tokenizer trained on the reviews, as a folder."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([review(n) for n in range(20)], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    torch.manual_seed(0)
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 1024}
    config = GPT2Config(vocab_size=len(fast), bos_token_id=0, eos_token_id=0, initializer_range=0.2, **size)
    GPT2LMHeadModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A dataset of long reviews with two subsets, a BPE GPT-2 and a byte GPT-2."""
    root = tmp_path_factory.mktemp("repos")
    for name, count in {"plain_text/train": 600, "plain_text/test": 20, "short/train": 5}.items():
        path = root / "imdb" / f"{name}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pa.table(
            {"text": [f"{name} {review(i)}" for i in range(count)], "label": [i % 2 for i in range(count)]}
        )
        pq.write_table(table, path, row_group_size=100)
    (root / "imdb" / "README.md").write_text(CARD)
    bpe_gpt2(root / "gpt2")
    tiny_model("gpt2", torch.float32).save_pretrained(root / "small")
    byte_tokenizer("gpt2").save_pretrained(root / "small")
    return root


@pytest.fixture
def hub(folders):
    with LoopbackHub() as hub:
        hub.add_dataset("stanfordnlp/imdb", folders / "imdb", aliases=["imdb"])
        hub.add_dataset("fancyzhx/yelp_polarity", folders / "imdb", aliases=["yelp_polarity"])
        hub.add_dataset("org/gated", folders / "imdb", gated=True)
        hub.add_model("openai-community/gpt2", folders / "gpt2", aliases=["gpt2"])
        hub.add_model("distilbert/distilgpt2", folders / "small", aliases=["distilgpt2"])
        hub.add_model("org/gated-model", folders / "small", gated=True)
        yield hub


def run_child(command, environment, cwd=None):
    child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=cwd)
    assert child.returncode == 0, child.stderr
    return child


def answers(code, environment):
    """What `note` noted in a child where only the hub can be reached."""
    child = run_child([sys.executable, "-c", START + code + END], environment | {"OMP_NUM_THREADS": "1"})
    return json.loads(child.stdout.partition("RESULTS")[2])


def test_the_example_runs_unchanged(hub, tmp_path):
    """`python sentiment_rlhf.py` with nothing but HF_ENDPOINT set: every line of it, and no complaint."""
    environment = hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
    child = run_child([sys.executable, str(EXAMPLE)], environment, cwd=tmp_path)
    # a random model need not end by itself, which a self-check tells; and long reviews are cut
    told = [line for line in child.stderr.splitlines() if "ended by itself" not in line]
    assert len(told) <= 1 and all("cut off at max_prompt_length" in line for line in told), told
    lines = child.stdout.splitlines()
    assert lines[3:8] == ["Model: gpt2", "LoRA: True", "Learning Rate: 0.001", "Batch Size: 4", "Max Iterations: 50"]
    iterations = [line for line in lines if line.startswith("[Iter")]
    assert len(iterations) == 50
    number = r" *-?\d+\.\d{3}"
    shape = rf"\[Iter +\d+\] Reward: {number} \(\+/- {number}\) \| KL: \d\.\d{{4}} \| Loss: -?\d+\.\d{{4}}"
    shape += r" \| Time: \d+\.\ds"
    assert all(re.fullmatch(shape, line) for line in iterations)
    assert "| KL: 0.0000 |" in iterations[0]
    assert "| KL: 0.0000 |" not in iterations[-1]
    assert lines[-1].startswith("Reward went from ")
    (run,) = (tmp_path / "runs").iterdir()
    rows = pq.read_table(run / "completions" / "000001.parquet").to_pylist()
    for row in rows:  # long reviews are cut to max_prompt_length, keeping the end
        whole = f"plain_text/train {review(row['row'])}"
        assert whole.endswith(row["prompt"])
        assert len(row["prompt"]) < len(whole)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(row["sampler_gap"] < 1e-5 and row["first_log_ratio"] < 1e-4 for row in metrics)
    assert (run / "final" / "adapter_model.safetensors").is_file()
    assert json.loads((run / "final" / "adapter_config.json").read_text())["base_model_name_or_path"] == "gpt2"
    assert not [request for request in hub.outside if "datasets-server" not in request[1]], "something phoned elsewhere"


def test_models_and_datasets_by_their_bare_names_subsets_splits_streams_and_revisions(hub, folders, tmp_path):
    (folders / "other").mkdir(exist_ok=True)
    (folders / "other" / "train.jsonl").write_text('{"text": "of the branch"}\n')
    hub.add_dataset("stanfordnlp/imdb", folders / "other", aliases=["imdb"], revision="branch")
    hub.add_model("openai-community/gpt2", folders / "small", aliases=["gpt2"], revision="bytes")
    values = {"peft_type": "LORA", "base_model_name_or_path": "gpt2", "revision": "bytes"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(values))
    (tmp_path / "adapter" / "adapter_model.safetensors").touch()
    code = """
def of_adapter():
    loaded = load_model("ADAPTER", {}, torch.device("cpu"))
    return [loaded.model.config.vocab_size, len(loaded.tokenizer), loaded.revision]
note("adapter", of_adapter)
note("distilgpt2", lambda: model("distilgpt2"))
note("revision", lambda: model("gpt2", revision="main"))
note("yelp", lambda: dataset(name="yelp_polarity", split="test", shuffle=False))
note("subset", lambda: dataset(name="imdb", subset="short", shuffle=False))
note("branch", lambda: dataset(name="imdb", revision="branch"))
note("drawn", lambda: dataset(name="imdb", split="train", max_samples=50))
note("stream", lambda: dataset(name="imdb", streaming=True, shuffle=False))
note("shuffled", lambda: dataset(name="imdb", streaming=True, max_samples=50))
note("again", lambda: dataset(name="imdb", streaming=True, max_samples=50))
note("gated model", lambda: model("org/gated-model", token="TOKEN"))
note("gated", lambda: dataset(name="org/gated", split="test", token="TOKEN", shuffle=False))
def walk():
    rows = load_prompts(DatasetConfig(name="imdb", split="test", streaming=True, prompt_column="text", held_out=4))
    first = [prompt.row for prompt in rows.batch(0, 10)]
    rest = [prompt.row for prompt in rows.batch(10, 30)]
    later = load_prompts(DatasetConfig(name="imdb", split="test", streaming=True, prompt_column="text", held_out=4))
    return [first + rest, [prompt.row for prompt in rows.held_out], [prompt.row for prompt in later.batch(10, 30)]]
note("walk", walk)
""".replace("TOKEN", MEMBER_TOKEN).replace("ADAPTER", str(tmp_path / "adapter"))
    found = answers(code, hub.environment(tmp_path / "home"))
    assert found["adapter"] == [257, 257, "bytes"]
    assert found["distilgpt2"] == ["GPT2LMHeadModel", "distilgpt2"]
    assert found["revision"] == ["GPT2LMHeadModel", "gpt2"]
    assert [row for row, _ in found["yelp"]] == [0, 1, 2]
    assert found["yelp"][0][1].startswith("plain_text/test Review 0.")
    assert found["subset"][2][1].startswith("short/train Review 2.")
    assert found["branch"] == [[0, "of the branch"]] * 3
    assert all(text.startswith(f"plain_text/train Review {row}.") for row, text in found["drawn"])
    assert [row for row, _ in found["stream"]] == [0, 1, 2]
    assert found["shuffled"] == found["again"] != found["stream"]
    assert all(text.startswith(f"plain_text/train Review {row}.") for row, text in found["shuffled"])
    assert found["gated model"] == ["GPT2LMHeadModel", "org/gated-model"]
    assert found["gated"][0][1].startswith("plain_text/test Review 0.")
    walked, held_out, later = found["walk"]
    assert sorted(walked[:16] + held_out) == list(range(20))  # every row once, then a new order of those 16
    assert sorted(walked[16:32]) == sorted(walked[:16]) != walked[16:32] != walked[:16]
    assert walked[10:40] == later
    assert hub.ranges


def test_what_was_fetched_once_is_there_offline(hub, tmp_path):
    code = """
note("model", lambda: model("gpt2"))
note("dataset", lambda: dataset(name="imdb", split="test"))
"""
    online = answers(code, hub.environment(tmp_path / "home"))
    before = len(hub.requests)
    assert answers(code, hub.environment(tmp_path / "home", offline=True)) == online
    assert len(hub.requests) == before


CONTINUED = """
from pathlib import Path
class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def length(self, prompt, response):
        return len(response) / 8
def continued(name, **model_kwargs):
    agent = KonicFinetuningAgent(
        name, Rewards(), dataset_config=DatasetConfig(prompts=["ab", "x"]), model_kwargs=model_kwargs,
        training_config=TrainingConfig(batch_size=2, ppo_epochs=1),
        generation_config=GenerationConfig(max_prompt_length=8, max_new_tokens=4),
    )
    engine = KonicFinetuningEngine.from_agent(agent, checkpoint_dir="RUN", callback=[], device="cpu")
    engine.setup()
    policy = engine._session.learner.policy
    ids = torch.tensor([[5, 9, 33]])
    start = policy.language_model.causal_lm(input_ids=ids).logits.tolist()
    engine.train(1)
    base = json.loads((Path("RUN") / "final" / "adapter_config.json").read_text())["base_model_name_or_path"]
    return [start, base, policy.tokenizer.eos_token, all("lora" in name for name in list(policy.trainable())[:-2])]
"""


def test_an_adapter_of_the_hub_is_continued_online_and_offline_and_its_base_runs_no_code(hub, folders, tmp_path):
    starts = {}
    for revision, scale in {"main": 0.1, "v2": 0.5}.items():
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
        model = peft.get_peft_model(tiny_model("gpt2", torch.float32), config)
        model.peft_config["default"].base_model_name_or_path = "distilgpt2"
        with torch.no_grad():
            for weight in (weight for weight in model.parameters() if weight.requires_grad):
                weight.add_(torch.randn(weight.shape) * scale)
            starts[revision] = model(input_ids=torch.tensor([[5, 9, 33]])).logits
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        tokenizer = byte_tokenizer("gpt2")
        tokenizer.eos_token = "a"  # tells this tokenizer from that of the base
        tokenizer.save_pretrained(tmp_path / "adapter")
        hub.add_model("me/adapter", tmp_path / "adapter", revision=revision, gated=True)
    shutil.copytree(folders / "small", tmp_path / "own-code")
    (tmp_path / "own-code" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    edit(tmp_path / "own-code" / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.M"})
    hub.add_model("me/base", tmp_path / "own-code")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="me/base")
    hub.add_model("me/of-own-code", tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="me/of-own-code")
    hub.add_model("me/of-adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    hub.add_model("me/without-weights", tmp_path / "adapter")
    continued = CONTINUED.replace("RUN", str(tmp_path / "run"))
    continued += f"""
note("main", lambda: continued("me/adapter", token="{MEMBER_TOKEN}"))
note("v2", lambda: continued("me/adapter", token="{MEMBER_TOKEN}", revision="v2"))
"""
    refused = """
note("gated", lambda: model("me/adapter", revision="main"))
note("v3", lambda: model("me/adapter", token="TOKEN", revision="v3"))
note("own code", lambda: model("me/of-own-code", trust_remote_code=True))
note("of adapter", lambda: model("me/of-adapter"))
note("without weights", lambda: model("me/without-weights"))
""".replace("TOKEN", MEMBER_TOKEN)
    found = answers(refused + continued, hub.environment(tmp_path / "home"))
    for revision, start in starts.items():
        assert torch.allclose(torch.tensor(found[revision][0]), start, atol=1e-5)
        assert found[revision][1:] == ["distilgpt2", "a", True]
    assert "it is gated" in found["gated"]
    assert "no such revision" in found["v3"]
    assert "contains its own code" in found["own code"] and "does not reach through an adapter" in found["own code"]
    assert not (tmp_path / "ran").exists()
    assert "has an adapter_config.json" in found["of adapter"]
    assert "there is no adapter_model.safetensors" in found["without weights"]
    num_requests = len(hub.requests)
    offline = answers(continued, hub.environment(tmp_path / "home", offline=True))
    assert [offline[name] for name in starts] == [found[name] for name in starts]
    assert len(hub.requests) == num_requests


FAILURES = {
    "wrong dataset": ("dataset(name='imbd')", "Dataset 'imbd' on the Hub .*nothing public with that name"),
    "wrong dataset with a namespace": (
        "dataset(name='org/imbd')",
        "Dataset 'org/imbd' .*nothing public with that name",
    ),
    "wrong model": ("model('gtp2')", "base_model='gtp2' .*nothing public with that name"),
    "wrong split": ("dataset(name='imdb', split='validation')", "split 'validation'.*train.*test"),
    "wrong subset": ("dataset(name='imdb', subset='long')", "subset 'long'.*plain_text.*short"),
    "wrong column": ("dataset(name='imdb', prompt_template='{txt}')", "no column 'txt'.*Did you mean 'text'"),
    "wrong revision": ("model('gpt2', revision='v9')", "no such revision"),
    "wrong dataset revision": ("dataset(name='imdb', revision='v9')", "no such revision"),
    "gated model": ("model('org/gated-model')", r"it is gated.*hf auth login.*model_kwargs=\{'token'"),
    "gated dataset": ("dataset(name='org/gated')", r"it is gated.*hf auth login.*DatasetConfig\(token="),
}


def test_every_failure_is_one_clear_error(hub, tmp_path):
    code = "".join(f"note({name!r}, lambda: {call})\n" for name, (call, _) in FAILURES.items())
    found = answers(code, hub.environment(tmp_path / "home"))
    for name, (_, told) in FAILURES.items():
        assert re.search(told, found[name], flags=re.DOTALL), f"{name}: {found[name]}"
        assert found[name].startswith(("DatasetError: ", "ModelError: ")), name


def test_a_broken_download_and_a_hub_out_of_reach_are_said_and_recovered_from(hub, tmp_path):
    hub.break_downloads("plain_text/test-00000-of-00001.parquet")
    hub.break_downloads("model.safetensors")
    code = """
note("dataset", lambda: dataset(name="imdb", split="test", shuffle=False))
note("model", lambda: model("gpt2"))
"""
    broken = answers(code, hub.environment(tmp_path / "home"))
    assert "the download was interrupted" in broken["dataset"]
    assert "the download was interrupted" in broken["model"]
    hub.repair()
    whole = answers(code, hub.environment(tmp_path / "home"))
    assert whole["model"] == ["GPT2LMHeadModel", "gpt2"]
    assert whole["dataset"][0][0] == 0
    lost = answers(code, out_of_reach(hub.environment(tmp_path / "other")))
    assert "the Hub cannot be reached" in lost["dataset"]
    assert "DatasetSource.BUNDLED) needs no Hub" in lost["dataset"]
    assert "the Hub cannot be reached" in lost["model"]
    assert "base_model='smollm2-135m' needs no Hub" in lost["model"]


def out_of_reach(environment):
    """The environment of a child that finds nobody at the Hub's address."""
    own = {name: value for name, value in environment.items() if "proxy" not in name.lower()}
    return own | {"HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1"}


def test_a_hub_out_of_reach_is_said_once_and_what_was_cached_is_read(hub, tmp_path):
    code = """
note("model", lambda: model("gpt2"))
note("dataset", lambda: dataset(name="imdb", split="test", shuffle=False))
note("again", lambda: model("gpt2"))
note("not cached", lambda: model("distilgpt2"))
import huggingface_hub
results["offline"] = huggingface_hub.constants.HF_HUB_OFFLINE
"""
    environment = hub.environment(tmp_path / "home")
    before = answers(code, environment)
    shutil.rmtree(next((tmp_path / "home").rglob("models--distil*")))
    child = run_child([sys.executable, "-c", START + code + END], out_of_reach(environment))
    after = json.loads(child.stdout.partition("RESULTS")[2])
    assert "the Hub cannot be reached, and the cache holds no copy" in after.pop("not cached")
    assert after == {name: before[name] for name in after}
    assert after["offline"] is False
    assert child.stderr.count("does not answer (ConnectError") == 1
    assert "Retrying" not in child.stderr


def test_a_hub_that_came_back_is_asked_again_after_an_error(hub, tmp_path):
    code = """
from huggingface_hub import constants
there, constants.ENDPOINT = constants.ENDPOINT, "http://127.0.0.1:9"
note("lost", lambda: model("gpt2"))
constants.ENDPOINT = there
note("found", lambda: model("gpt2"))
"""
    found = answers(code, hub.environment(tmp_path / "home"))
    assert "cannot be reached" in found["lost"]
    assert found["found"] == ["GPT2LMHeadModel", "gpt2"]


def test_a_hub_that_answers_with_an_error_is_not_called_out_of_reach():
    refused, error = OSError("forbidden"), LocalEntryNotFoundError("not in the cache")
    refused.response, error.__cause__ = SimpleNamespace(status_code=403), refused
    explained = explain_hub_error(error, "TOKEN", "A folder")
    assert explained.startswith("the Hub answers with HTTP 403, and the cache holds no copy.")
    assert "check TOKEN. A folder needs no Hub." in explained


def test_a_failure_that_is_explained_has_no_traceback_of_a_library(hub, tmp_path):
    code = "\ntry:\n    load_model('no/such', {}, torch.device('cpu'))\nexcept KonicError as error:\n    raise error"
    command = [sys.executable, "-c", START + code]
    child = subprocess.run(command, env=hub.environment(tmp_path), capture_output=True, text=True, timeout=240)
    assert "the Hub has nothing public with that name" in child.stderr
    assert "site-packages" not in child.stderr
