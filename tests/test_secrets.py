"""Access tokens, passwords and signed addresses stand in no message, log, file, card or tracker of a run."""

import copy
import json
import pickle
import re
import traceback
from dataclasses import replace

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from conftest import PLANTED, PROMPTS, files_with
from konic.cli.settings import set_settings
from konic.finetuning import (
    ConfigError,
    DatasetConfig,
    DatasetError,
    GenerationConfig,
    KonicFinetuningAgent,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    LoraConfig,
    ModelError,
    RewardError,
    TrainingConfig,
    llm_reward,
)
from konic.finetuning.callbacks.composite import CompositeCallback
from konic.finetuning.data.prompts import load_prompts
from konic.finetuning.models.locations import loading_failed
from konic.finetuning.results.intervals import Interval
from konic.finetuning.reward_models.saving import RewardModelReport, _card
from konic.finetuning.run.card import model_card
from test_engine import LetterRewards, Silent, make_agent, make_engine

TOKEN = "plain7Token9of3Nobody"  # looks like no token of a known kind
SIGNED = f"https://cdn.example/file?X-Amz-Credential=AKID&X-Amz-Signature={TOKEN}"
CONFIGS = [DatasetConfig, TrainingConfig, GenerationConfig, LoraConfig]


class Letters(KonicLLMRewardComposer):
    @llm_reward
    def letters(self, prompt, response):
        return float(len(response))


class Leaky(LetterRewards):
    """Fails on every other response, with secrets in its error and in the cause of it."""

    @llm_reward
    def judge(self, prompt, response):
        if len(response) % 2:
            try:
                raise LookupError(SIGNED)
            except LookupError as error:
                raise ValueError(f"401 for https://me:{PLANTED}@judge.example, token={TOKEN}\x1b[2J") from error
        return 1.0


def agent_with(**options):
    return KonicFinetuningAgent(**{"base_model": "any", "reward_composer": Letters()} | options)


def refusal(action):
    with pytest.raises(ConfigError) as error:
        action()
    return "".join(traceback.format_exception(error.value)[-1:])


# --- configs and agents ---


def test_no_config_or_agent_shows_its_token():
    config = DatasetConfig(name="a/b", token=TOKEN)
    agent = agent_with(dataset_config=config, model_kwargs={"token": TOKEN})
    for thing in (config, agent, agent.settings(uses_lora=True), agent.get_training_config(), config.to_dict()):
        assert TOKEN not in repr(thing) + str(thing) + f"{thing}"
    assert config.token == agent.get_model_kwargs()["token"] == TOKEN, "it is used as it is"


@pytest.mark.parametrize("wrong", [[TOKEN], b"\xff" + TOKEN.encode(), {TOKEN: 1}, 3.5, [("token", TOKEN)]])
def test_no_message_about_an_assignment_shows_the_token(wrong):
    config = DatasetConfig(name="a/b", token=TOKEN)
    for action in (
        lambda: setattr(config, "token", wrong),
        lambda: setattr(config, "split", wrong),
        lambda: setattr(config, "tokn", TOKEN),
        lambda: setattr(config, "streaming", "perhaps"),
        lambda: config.with_fields({"token": wrong}),
        lambda: set_settings(agent_with(dataset_config=config), [f"dataset_config.token={json.dumps([TOKEN])}"]),
    ):
        assert TOKEN not in refusal(action)


@pytest.mark.parametrize(
    "given", [[("token", TOKEN)], (("token", TOKEN),), {("token", TOKEN)}, f"token={TOKEN}", TOKEN, iter([TOKEN])]
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_no_message_about_something_in_place_of_a_config_shows_the_token(kind, given):
    assert TOKEN[:10] not in refusal(lambda: kind.from_value(given))
    assert TOKEN[:10] not in refusal(lambda: kind(given))
    name = {DatasetConfig: "dataset", TrainingConfig: "training", GenerationConfig: "generation", LoraConfig: "lora"}
    assert TOKEN[:10] not in refusal(lambda: agent_with(**{f"{name[kind]}_config": given}))


@pytest.mark.parametrize(
    "options",
    [
        {"model_kwargs": [("token", TOKEN)]},
        {"model_kwargs": f"token={TOKEN}"},
        {"base_model": [TOKEN]},
        {"reward_composer": {"token": TOKEN}},
        {"tokn": TOKEN},
        {"dataset_config": {"name": "a/b", "chat_template_kwargs": [("token", TOKEN)]}},
        {"dataset_config": {"name": "a/b", "token": TOKEN, "max_samples": -1}},
        {"generation_config": {"stop": {"token": TOKEN}}},
        {"training_config": {"learning_rate": {"api_key": TOKEN}}},
    ],
    ids=str,
)
def test_no_message_of_an_agent_shows_a_token(options):
    assert TOKEN[:10] not in refusal(lambda: agent_with(**options))


def test_an_agent_of_ones_own_is_named_by_its_type():
    class Agent:
        def __repr__(self):
            return f"Agent({TOKEN!r})"

    message = refusal(lambda: KonicFinetuningEngine.from_agent(Agent()))
    assert TOKEN not in message and "Agent" in message


def test_settings_hide_what_stands_inside_of_them():
    agent = agent_with(
        dataset_config={"name": "a/b", "token": TOKEN, "chat_template_kwargs": {"api_key": "another1Key"}},
        model_kwargs={"token": TOKEN, "quantization_config": {"nested": {"password": "another2Key"}}},
        generation_config={"stop": [SIGNED]},
    )
    text = json.dumps(agent.settings(uses_lora=True))
    assert not any(secret in text for secret in (TOKEN, "another1Key", "another2Key"))


def test_copies_and_pickles_keep_the_token_and_hide_it():
    config = DatasetConfig(name="a/b", token=TOKEN)
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), config.model_copy()):
        assert other.token == TOKEN and TOKEN not in repr(other)


# --- the Hub ---


@pytest.mark.parametrize("name", ["a/b", "imdb"])
def test_an_error_of_the_hub_keeps_no_signed_address(name, monkeypatch):
    def fails(*_, **__):
        try:
            raise OSError(f"GET {SIGNED}")
        except OSError as error:
            raise ConnectionAbortedError(f"{SIGNED}\n{'x ' * 100}Bearer {TOKEN}") from error

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DatasetError) as error:
        load_prompts(DatasetConfig(name=name))
    shown = "".join(traceback.format_exception(error.value))
    assert TOKEN not in shown and "AKID" not in shown and "cdn.example/file?***" in shown


def test_an_error_of_transformers_keeps_no_signed_address(tmp_path):
    for location in ("a/b", str(tmp_path)):
        message = loading_failed("base_model='a/b'", location, OSError(f"{'x' * 220} {SIGNED}"))
        assert TOKEN[:6] not in str(ModelError(message))


# --- a run ---


class Seen(Silent):
    def __init__(self):
        super().__init__()
        self.texts = []

    def on_train_begin(self, config):
        self.texts.append(json.dumps(config, default=str))

    def on_train_error(self, error):
        self.texts.append("".join(traceback.format_exception(error)))


def test_a_run_writes_and_says_no_secret(model_folders, tmp_path, capsys, caplog):
    seen = Seen()
    options = {"composer": Leaky(), "on_reward_error": "skip", "max_error_rate": 1.0, "save_every": 1}
    save_every = options.pop("save_every")
    callback = CompositeCallback([seen, KonicFinetuningCallback(log_samples=True)])
    make_engine(model_folders["llama"], tmp_path / "run", callback, **options).train(2, save_every)
    resumed = make_engine(model_folders["llama"], tmp_path / "run", callback, **options)
    resumed.train(3, save_every, resume_from_checkpoint=True)
    captured = capsys.readouterr()
    said = captured.out + captured.err + caplog.text + "".join(seen.texts)
    assert "Skipped a response: Reward 'judge' raised ValueError: 401 for https://***@judge.example, token=***" in said
    for secret in (TOKEN, PLANTED):
        assert secret not in said
        assert files_with(secret, tmp_path) == []
    errors = [row["error"] for file in sorted((tmp_path / "run/completions").glob("*.parquet"))
              for row in pyarrow.parquet.read_table(file).to_pylist() if row["error"]]  # fmt: skip
    assert errors and all("token=***" in error and "\x1b" not in error for error in errors)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_error_that_ends_a_run_holds_no_secret(model_folders, tmp_path, workers):
    seen = Seen()
    engine = make_engine(model_folders["llama"], tmp_path, seen, composer=Leaky(), reward_workers=workers)
    with pytest.raises(RewardError, match="Reward 'judge' raised ValueError: 401") as error:
        engine.train(3)
    shown = "".join([*traceback.format_exception(error.value), *seen.texts])
    assert TOKEN not in shown and PLANTED not in shown and "\x1b" not in shown
    assert "LookupError" in shown, "the cause is shown, without its secret"


def test_the_search_finds_a_secret_in_every_kind_of_file(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/run.json").write_text(json.dumps({"a": TOKEN}))
    (tmp_path / "README.md").write_text(f"a\n{TOKEN}\n")
    rows = {"error": [f"{number}: {TOKEN}" for number in range(300)]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "000001.parquet", compression="zstd")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1PAR1")
    (tmp_path / "plain.txt").write_text("nothing")
    names = sorted(path.name for path in files_with(TOKEN, tmp_path))
    assert names == ["000001.parquet", "README.md", "run.json"]


# --- text is text ---


ODD = "p \x1b[2J\u202e <b>|`# =1+1\r\n"


def test_rewards_and_records_get_texts_as_they_are(model_folders, tmp_path):
    got = []

    class Reads(KonicLLMRewardComposer):
        @llm_reward
        def reads(self, prompt, response, note):
            got.append((prompt, response, note))
            return float(len(response))

    rows = [{"prompt": f"{text} {ODD}", "note": f"{ODD}token='{TOKEN}'"} for text in PROMPTS]
    options = {"dataset": DatasetConfig(prompts=rows), "generation": {"max_prompt_length": 120}}
    engine = make_engine(model_folders["llama"], tmp_path, composer=Reads(), **options)
    engine.train(1)
    wanted = {(row["prompt"], row["note"]) for row in rows}
    assert {(prompt, note) for prompt, _, note in got} <= wanted
    (file,) = (tmp_path / "completions").glob("*.parquet")
    records = pyarrow.parquet.read_table(file).to_pylist()
    assert {(record["prompt"], record["response"]) for record in records} == {one[:2] for one in got}


@pytest.fixture(scope="module")
def result(model_folders, tmp_path_factory):
    return make_engine(model_folders["llama"], tmp_path_factory.mktemp("run")).train(1)


@pytest.mark.parametrize(
    "name", ["<b>", "a|b", "`x`", "# h", "[a](http://b)", "\x1b[2J", "\u202e", "a\nb", "=1+1", "a: b", "***"]
)
def test_the_card_of_a_run_shows_odd_names_as_text(name, result):
    last = replace(result.history[-1], reward_breakdown={name: 1.0})
    result = replace(result, model_name=name, history=[last])
    card = model_card(result, make_agent(name).settings(uses_lora=True), name, is_adapter=True)
    body = card.split("\n---\n", 1)[1].partition("```python")[0]
    assert not any(char in card for char in "\x1b\u202e") and not any(
        part in body for part in ("<b>", "a|b", "`x`", "# h", "](", "\nb")
    )
    assert len(re.findall("^#", body, flags=re.MULTILINE)) == 1
    settings = json.loads(card.split("```json\n")[1].split("\n```")[0])
    assert settings["model_name"] == name, "JSON keeps the text"


def test_the_card_of_a_reward_model_shows_odd_labels_as_text(tmp_path):
    report = RewardModelReport(folder=tmp_path, num_examples=4, accuracy=Interval(1, 1, 1), num_held_out=2)
    card = _card(
        "pair", ["<img src=x>", "a\n# heading", "[a](http://b)", f"token={TOKEN}", "\x1b[2J"], "base\u202e", report
    )
    body = card.split("\n---\n", 1)[1]
    assert "\u202e" not in card
    assert not any(part in body for part in ("<img", "\n# heading", "](", TOKEN, "\x1b"))


@pytest.mark.parametrize("odd", ["\x1b[2J", "\u202e", "\x9b31m", "\r", "\x07", "\nRun this: curl"])
def test_odd_names_of_files_columns_models_and_rewards_steer_nothing(odd, tmp_path, caplog):
    folder = tmp_path / f"data{odd}"
    folder.mkdir()
    (folder / f"train{odd}.json").write_text(json.dumps([{f"text{odd}": "a"}]))
    broken = tmp_path / f"broken{odd}.json"
    broken.write_text("{")

    def refused(action):
        with pytest.raises((ConfigError, DatasetError, ModelError)) as error:
            action()
        assert not any(char in str(error.value) for char in "\n\x1b\u202e\x9b\r\x07")

    for name in (folder, broken, tmp_path / f"absent{odd}.csv"):
        refused(lambda name=name: load_prompts(DatasetConfig(source="local", name=str(name))))
    refused(lambda: make_engine(str(folder), tmp_path / "run").train(1))
    refused(lambda: Letters(reward_weights={f"x{odd}": "much"}))
    refused(lambda: Letters().add_reward_function(Letters, name=f"x{odd}"))
    Letters(reward_weights={f"x{odd}": 1.0})
    assert caplog.text.count("\n") == 1
    assert not any(char in caplog.text for char in "\x1b\u202e\x9b\r\x07")
