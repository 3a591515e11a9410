import copy

import peft
import pytest
import torch

from conftest import tiny_model
from konic.finetuning import (
    ConfigError,
    DatasetConfig,
    GenerationConfig,
    KonicFinetuningAgent,
    KonicFinetuningEngine,
    KonicLLMRewardComposer,
    LoraConfig,
    RewardError,
    TrainingConfig,
    llm_reward,
)
from konic.finetuning.agent import read_agent


class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def one(self, prompt, response):
        return 1.0


def test_configs_may_be_objects_or_dicts_and_come_back_from_the_getters():
    agent = KonicFinetuningAgent(
        base_model="gpt2",
        reward_composer=Rewards(),
        lora_config={"r": 4},
        dataset_config=DatasetConfig(prompts=["a"]),
        training_config={"batch_size": 2},
        generation_config=GenerationConfig(max_new_tokens=3),
        model_kwargs={"revision": "main"},
    )
    assert agent.get_base_model() == "gpt2"
    assert agent.get_lora_config() == LoraConfig(r=4)
    assert agent.get_dataset_config().prompts == ("a",)
    assert agent.get_training_config() == TrainingConfig(batch_size=2)
    assert agent.get_generation_config().max_new_tokens == 3
    assert agent.get_model_kwargs() == {"revision": "main"}
    assert isinstance(agent.get_reward_composer(), Rewards)


def test_only_the_model_and_the_rewards_are_required():
    agent = KonicFinetuningAgent("gpt2", Rewards())
    assert agent.get_lora_config() is None
    assert agent.get_training_config() == TrainingConfig()


@pytest.mark.parametrize(
    ("name", "value"),
    [("base_model", "a\ud800"), ("model_kwargs", {"revision": "a\ud800"}), ("model_kwargs", {"a\ud800": 1})],
)
def test_text_with_half_a_character_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name} must be valid text, without half a character"):
        KonicFinetuningAgent(**{"base_model": "gpt2", "reward_composer": Rewards(), name: value})


def test_a_peft_lora_config_is_taken_and_prompt_learning_is_not():
    given = peft.LoraConfig(r=2, target_modules=["c_attn"])
    assert KonicFinetuningAgent("gpt2", Rewards(), given).get_lora_config() is given
    with pytest.raises(ConfigError, match="init_lora_weights=False starts from a random change"):
        KonicFinetuningAgent("gpt2", Rewards(), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    with pytest.raises(ConfigError, match=r"PromptTuningConfig is not supported.*Use LoraConfig\(r=8"):
        KonicFinetuningAgent("gpt2", Rewards(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(ConfigError, match=r"AdaLoraConfig is not supported.*Use LoraConfig\(r=8"):
        KonicFinetuningAgent("gpt2", Rewards(), peft.AdaLoraConfig(task_type="CAUSAL_LM", total_step=10))
    with pytest.raises(ConfigError, match="lora_config must be a LoraConfig"):
        KonicFinetuningAgent("gpt2", Rewards(), "lora")


def test_the_composers_kl_weight_wins():
    given = {"kl_penalty_weight": 0.3}
    assert KonicFinetuningAgent("gpt2", Rewards(), training_config=given).kl_penalty_weight == 0.3
    composer = Rewards(kl_penalty_weight=0.0)
    assert KonicFinetuningAgent("gpt2", composer, training_config=given).kl_penalty_weight == 0.0


def test_a_folder_may_be_given_as_a_path(tmp_path):
    agent = KonicFinetuningAgent(base_model=tmp_path, reward_composer=Rewards())
    assert agent.get_base_model() == str(tmp_path)


def test_what_cannot_be_is_said_before_anything_is_loaded():
    with pytest.raises(ConfigError, match="base_model must name a model"):
        KonicFinetuningAgent(None, Rewards())
    with pytest.raises(ConfigError, match=r"got the class \w+: add \(\)"):
        KonicFinetuningAgent("gpt2", Rewards)
    with pytest.raises(RewardError, match=r"has no rewards. Mark at least one method"):
        KonicFinetuningAgent("gpt2", KonicLLMRewardComposer())
    with pytest.raises(ConfigError, match="training_config must be a TrainingConfig or a dict"):
        KonicFinetuningAgent("gpt2", Rewards(), training_config=4)


class Parts:
    """An agent that is no KonicFinetuningAgent; each getter can be replaced."""

    def __init__(self, **getters):
        self.get_base_model, self.get_reward_composer = lambda: "gpt2", Rewards
        vars(self).update(getters)


@pytest.mark.parametrize("value", [LoraConfig(), None, "lora"])
def test_a_getter_that_is_no_method_is_named(value):
    with pytest.raises(ConfigError, match="get_lora_config must be a method, got"):
        read_agent(Parts(get_lora_config=value))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"base_model": "gpt2"}, "reward_composer must be a KonicLLMRewardComposer, got"),
        ({"reward_composer": Rewards()}, "base_model must name a model or a folder, got"),
        ({"model_name": "gpt2", "reward_composer": Rewards()}, "no argument 'model_name'. Here it is base_model"),
        ({"base_model": "gpt2", "rewards": Rewards()}, "no argument 'rewards'. Here it is reward_composer"),
        ({"base_model": torch.nn.Linear(2, 2), "reward_composer": Rewards()}, r"got torch\..*Linear\.$"),
        (
            {"base_model": tiny_model("llama"), "reward_composer": Rewards()},
            r"got transformers\.\S+: save it with",
        ),
        ({"base_model": "x", "reward_composer": Rewards(), "dataset_config": TrainingConfig()}, "^dataset_config must"),
        ({"base_model": "x", "reward_composer": Rewards(), "dataset_config": ["a"]}, r"Write DatasetConfig\(prompts="),
        ({"base_model": "x", "reward_composer": Rewards(), "dataset_config": "a.csv"}, r"Write DatasetConfig\(name="),
        ({"base_model": "x", "reward_composer": Rewards(), "lora_config": True}, r"Write LoraConfig\(r=8\)"),
        ({"base_model": "x", "reward_composer": len}, r"KonicLLMRewardComposer\(reward_functions=\[f\]\)"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_short_sentence(arguments, told):
    with pytest.raises(ConfigError, match=told) as error:
        KonicFinetuningAgent(**arguments)
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "needs a model_name, or an agent: from_agent"),
        ({"base_model": "gpt2", "reward_composer": Rewards()}, "no argument 'base_model'. Here it is model_name"),
        (
            {"model_name": "gpt2", "reward_composer": Rewards(), "tokenizer": 3},
            "no argument 'tokenizer'. It has",
        ),
        ({"model_name": "gpt2", "reward_composer": Rewards(), "checkpoint_dr": "x"}, "Did you mean 'checkpoint_dir'"),
    ],
)
def test_a_mistake_in_the_engines_arguments_is_named(arguments, told):
    with pytest.raises(ConfigError, match=told):
        KonicFinetuningEngine(**arguments)


@pytest.mark.parametrize(
    "name",
    ["base_model", "reward_composer", "lora_config", "dataset_config", "training_config", "generation_config",
     "model_kwargs", "method"],
)  # fmt: skip
def test_another_value_for_an_argument_is_refused_where_no_getter_would_return_it(name):
    agent = KonicFinetuningAgent("gpt2", Rewards(), {"r": 4})
    told = rf"An agent keeps its {name}: give it to KonicFinetuningAgent\({name}=...\)"
    with pytest.raises(ConfigError, match=told + (", or use agent.with_settings" if "config" in name else ", for")):
        setattr(agent, name, object())
    assert agent.get_lora_config() == LoraConfig(r=4)


def test_a_subclass_keeps_what_it_was_given_under_any_name():
    class Own(KonicFinetuningAgent):
        def __init__(self, folder, lora_config=None, **parts):
            self.base_model, self.training_config, self.folder, self._own = "early", {"seed": 1}, folder, 1
            super().__init__(folder, Rewards(), lora_config, **parts)
            self.base_model, self.lora_config, self.model_name = folder, lora_config, "free"

    agent = Own("gpt2", {"r": 4}, training_config={"seed": 2})
    assert (agent.base_model, agent.get_base_model(), agent.lora_config) == ("gpt2", "gpt2", {"r": 4})
    assert (agent.training_config.seed, agent.get_lora_config().r) == (2, 4)
    assert agent.with_settings({"lora_config": {"r": 8}}).get_lora_config().r == 8


def test_what_an_agent_has_already_may_be_assigned_and_changes_nothing(tmp_path):
    class Own(KonicFinetuningAgent):
        def __init__(self, folder, training_config=None, model_kwargs=None):
            super().__init__(folder, Rewards(), training_config=training_config, model_kwargs=model_kwargs)
            self.base_model, self.model_kwargs = f"{folder}", model_kwargs or {}
            self.training_config, self.dataset_config = training_config, self.get_dataset_config()

    agent = Own(tmp_path / "gpt2")
    assert (agent.get_training_config(), agent.get_model_kwargs()) == (TrainingConfig(), {})
    assert agent.with_settings({"training_config": {"batch_size": 4}}).get_training_config().batch_size == 4
    with pytest.raises(ConfigError, match=r"An agent keeps its base_model: give it to super\(\).__init__\(base_model"):
        agent.base_model = "another"


def test_what_is_assigned_before_init_is_not_lost_in_silence():
    class Own(KonicFinetuningAgent):
        def __init__(self, **parts):
            self.lora_config = LoraConfig(r=4)
            super().__init__("gpt2", Rewards(), **parts)

    with pytest.raises(ConfigError, match=r"lora_config was assigned before super\(\).__init__\(lora_config"):
        Own()
    assert Own(lora_config={"r": 8}).get_lora_config().r == 8


def test_a_copy_of_an_agent_does_not_copy_what_cannot_be_copied():
    agent = KonicFinetuningAgent("gpt2", Rewards(), dataset_config={"prompts": (text for text in ("a", "b"))})
    other = copy.deepcopy(agent).with_settings({"training_config": {"seed": 3}})
    assert other.get_training_config().seed == 3
    with pytest.raises(ConfigError, match="An agent keeps its training_config"):
        other.training_config = TrainingConfig()


def test_a_subclass_without_a_call_of_init_has_what_it_assigns():
    class Own(KonicFinetuningAgent):
        def __init__(self):
            self.base_model, self.reward_composer = "gpt2", Rewards()
            self.training_config, self.lora_config = {"seed": 1}, {"r": 4}

    class WithGetter(Own):
        def __init__(self):
            super().__init__()
            self.training_config = {"seed": 3}

        def get_training_config(self):
            return self.training_config

    agent = read_agent(Own())
    assert (agent.get_training_config().seed, agent.get_lora_config()) == (1, LoraConfig(r=4))
    assert read_agent(WithGetter()).get_training_config().seed == 3
