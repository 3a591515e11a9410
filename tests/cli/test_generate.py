"""`konic generate`: responses of a run's weights and of its base model, as the engine gives them."""

import json

import pytest

from command import konic_here
from konic.finetuning import GenerationConfig, KonicFinetuningAgent, KonicFinetuningEngine, KonicLLMRewardComposer
from konic.finetuning import llm_reward as reward
from test_engine import make_engine

PROMPTS = ["a b", "c"]


class Nothing(KonicLLMRewardComposer):
    @reward
    def nothing(self, prompt, response):
        return 0.0


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folders):
    folder = tmp_path_factory.mktemp("generate") / "run"
    make_engine(model_folders["llama"], folder).train(2, save_every=1)
    return folder


def responses(run, model):
    """What an engine of its own gives, with the run's other settings."""
    own = json.loads((run / "run.json").read_text())["settings"]["generation_config"]
    generation = GenerationConfig(**own | {"max_new_tokens": 6, "temperature": 0.9})
    agent = KonicFinetuningAgent(str(model), Nothing(), generation_config=generation)
    return KonicFinetuningEngine.from_agent(agent, device="cpu").generate(PROMPTS)


def generated(run, *options):
    done = konic_here(
        "generate", run, *PROMPTS, "--json", "--max-new-tokens", 6, "--temperature", 0.9, "--device", "cpu", *options
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_responses_are_those_of_the_saved_weights_and_of_the_base(run, model_folders):
    rows = generated(run)
    assert [list(row) for row in rows] == [["prompt", "base", "final"]] * 2
    assert [row["prompt"] for row in rows] == PROMPTS
    assert [row["base"] for row in rows] == responses(run, model_folders["llama"])
    assert [row["final"] for row in rows] == responses(run, run / "final")


def test_any_weights_of_the_run_can_be_named(run):
    rows = generated(run, "--weights", "checkpoint-1", "--no-base")
    assert [list(row) for row in rows] == [["prompt", "checkpoint-1"]] * 2
    assert [row["checkpoint-1"] for row in rows] == responses(run, run / "checkpoint-1")
    assert generated(run, "--no-base", "--seed", 5) != generated(run, "--no-base")


def test_without_json_each_response_is_a_line(run):
    done = konic_here("generate", run, "a b", "--max-new-tokens", 3, "--device", "cpu")
    assert [line.partition(":")[0] for line in done.stdout.splitlines()][:3] == ["prompt", "base", "final"]


def test_what_cannot_be_generated_is_one_error(run, tmp_path):
    for arguments, said in (
        ((run, "x", "--weights", "checkpoint-7"), "no weights 'checkpoint-7'. Did you mean 'checkpoint-1'?"),
        ((run, "x", "--weights", "../run/final"), "no weights '../run/final'"),
        ((tmp_path / "nowhere", "x"), "there is no such folder"),
        ((run / "final", "x"), "Did you mean"),
    ):
        done = konic_here("generate", *arguments)
        assert done.returncode == 1 and said in done.stderr, done.stderr


def test_a_run_of_a_stranger_is_not_trusted(run, tmp_path):
    """What its settings say about remote code, tokens and sizes reaches no model."""
    from konic.saved.agents import SavedRun

    record = json.loads((run / "run.json").read_text())
    record["settings"]["model_kwargs"] = {"trust_remote_code": True, "token": "x" * 9, "dtype": "float32"}
    record["settings"]["lora_config"]["r"] = 10**12
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    (tmp_path / "final").mkdir()
    (tmp_path / "run.json").write_text(json.dumps(record))
    saved = SavedRun.read(tmp_path)
    agents = {name: saved.agent(name) for name in ("base", saved.name_of(None))}
    assert [agent.get_model_kwargs() for agent in agents.values()] == [{"dtype": "float32"}] * 2
    assert agents["base"].get_lora_config().r == 1
