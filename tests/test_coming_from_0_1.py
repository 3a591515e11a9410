"""Scripts written for konic 0.1: names where it had them, and what it accepted."""

import importlib

import pytest

import konic
import konic.finetuning
from konic.finetuning import (
    ConfigError,
    DatasetConfig,
    DatasetSource,
    GenerationConfig,
    KonicLLMRewardComposer,
    LoraConfig,
    TrainingConfig,
)
from test_engine import LetterRewards, make_engine, metrics


@pytest.mark.parametrize("module", ["callback", "reward", "dataset", "config", "engine", "agent"])
def test_public_names_are_the_same_objects_where_konic_0_1_had_them(module):
    found = importlib.import_module(f"konic.finetuning.{module}")
    own = [name for name in konic.finetuning.__all__ if hasattr(found, name)]
    assert own
    assert all(getattr(found, name) is getattr(konic.finetuning, name) for name in own)


def test_the_version_satisfies_what_scripts_ask_for():
    assert tuple(map(int, konic.__version__.split(".")[:2])) >= (0, 2)


class OldModel:
    """A reward model of konic 0.1."""

    def __init__(self, name, **methods):
        self.name = name
        for method, function in methods.items():
            setattr(self, method, function)


def test_reward_models_of_konic_0_1_score():
    one = OldModel("one", compute_reward=lambda prompt, response: float(len(response)))
    both = OldModel(
        "both",
        compute_reward=lambda prompt, response: -1.0,
        batch_compute_reward=lambda prompts, responses: [float(len(prompt)) for prompt in prompts],
    )
    composer = KonicLLMRewardComposer([one, both])
    totals, breakdown = composer.compose_batch(["p", "pp"], ["abc", ""])
    assert breakdown == {"one": [3.0, 0.0], "both": [1.0, 2.0]}
    assert totals == [4.0, 2.0]
    with pytest.raises(ConfigError, match=r"needs a name and a method score"):
        KonicLLMRewardComposer([OldModel("none")])


def test_a_weight_for_a_reward_that_is_switched_off_is_a_warning(caplog):
    composer = LetterRewards(reward_weights={"leters": 2.0, "brief": 3.0})
    assert "LetterRewards has no reward 'leters'. Did you mean 'letters'?" in caplog.text
    assert "brief" not in caplog.text
    assert composer.compose("p", "ab") == pytest.approx(2 / 8 - 3 * 2 / 80)

    def later(prompt, response):
        return 1.0

    added = LetterRewards(reward_weights={"later": 5.0}).add_reward_function(later)
    assert added.compose("p", "") == 5.0


def test_saving_may_be_off_and_nothing_to_do_is_a_result(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path / "run")
    nothing = engine.train(max_iterations=0)
    assert (nothing.total_iterations, nothing.model_path) == (0, None)
    assert not (tmp_path / "run").exists()
    engine.train(max_iterations=2, save_every=0)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(metrics(tmp_path / "run")) == 2
    for wrong in ({"max_iterations": -1}, {"save_every": -1}, {"save_total_limit": 0}, {"max_iterations": True}):
        with pytest.raises(ConfigError, match=r"must be a whole number of at least [01]"):
            engine.train(**wrong)


def test_configs_have_what_konic_0_1_had():
    training = TrainingConfig(batch_size=2, gradient_accumulation_steps=4)
    assert training.effective_batch_size == 2  # what one step averages over
    assert TrainingConfig.from_dict(training.to_dict()) == training
    assert "hf_secret" not in str(DatasetConfig(name="a/b", token="hf_secret").to_dict())
    presets = TrainingConfig.fast_debug(), TrainingConfig.cpu_optimized(), TrainingConfig.gpu_optimized()
    assert [preset.batch_size for preset in presets] == [2, 1, 16]


@pytest.mark.parametrize(
    ("kind", "field", "successor"),
    [
        (TrainingConfig, "samples_per_iteration", "batch_size"),
        (GenerationConfig, "max_length", "max_prompt_length"),
        (DatasetConfig, "preprocessing_fn", "prompts="),
        (DatasetConfig, "response_column", "sampled"),
        (DatasetConfig, "chosen_column", "konic reward-model train"),
        (DatasetConfig, "rejected_column", "konic reward-model train"),
        (DatasetConfig, "context_column", "prompt_template"),
        (LoraConfig, "to_peft_config", "peft.LoraConfig"),
    ],
)
def test_a_field_that_is_not_offered_names_its_successor(kind, field, successor):
    with pytest.raises(ConfigError, match=f"has no field '{field}'.*{successor}") as error:
        kind(**{field: 1})
    assert "Did you mean" not in str(error.value)
    with pytest.raises(AttributeError, match=successor):
        getattr(kind(), field)


def test_the_cloud_is_not_offered():
    with pytest.raises(ConfigError, match=r"KONIC_CLOUD is not offered: .* LOCAL"):
        DatasetConfig(source=DatasetSource.KONIC_CLOUD, name="prompts")
