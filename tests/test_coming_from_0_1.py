"""Scripts written for konic 0.1: names where it had them, and what it accepted."""

import copy
import importlib
import pickle

import pytest

import konic
import konic.finetuning
from konic.cli.scripts import load_agent
from konic.finetuning import (
    BaseKonicFinetuningAgent,
    BaseKonicLLMRewardComposer,
    BaseRewardModel,
    BaseRewardReducer,
    ConfigError,
    DatasetConfig,
    DatasetSource,
    FinetuningResult,
    GenerationConfig,
    KonicFinetuningAgent,
    KonicFinetuningCallback,
    KonicFinetuningEngine,
    KonicFinetuningMethodType,
    KonicLLMRewardComposer,
    LoraConfig,
    MaxReducer,
    RewardError,
    TrainingConfig,
    WeightedSumReducer,
)
from konic.finetuning.successors import MODULES, SUCCESSORS
from test_engine import LetterRewards, Silent, make_engine, metrics, same_tensors, weights


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


class OwnModel(BaseRewardModel):
    name = "own"

    def compute_reward(self, prompt, response, **more):
        return float(self.score(response))

    def score(self, text):
        return len(text)


def test_a_helper_named_score_is_not_what_scores():
    class Batches(OwnModel):
        def score(self, prompts, responses):
            return [7.0] * len(prompts)

    class Alone:
        name = "alone"

        def score(self, texts, answers):
            return [2.0] * len(texts)

    class Helper(OwnModel):
        def batch_compute_reward(self, texts):
            return texts

    for model, expected in ((OwnModel(), 3.0), (Batches(), 7.0), (Alone(), 2.0), (Helper(), 3.0)):
        assert KonicLLMRewardComposer([model]).compose("p", "abc") == expected


def test_what_a_subclass_sets_in_the_composer_of_konic_0_1_counts():
    class Own(KonicLLMRewardComposer):
        def __init__(self, models):
            super().__init__()
            self._reward_models = models
            self._kl_penalty_weight = 0.25

    composer = Own([OwnModel()])
    assert composer.compose("p", "abc") == 3.0
    assert (composer.kl_penalty_weight, composer._kl_penalty_weight) == (0.25, 0.25)
    assert KonicLLMRewardComposer()._kl_penalty_weight == 0.0
    appended = KonicLLMRewardComposer()
    appended._reward_models.append(OwnModel())
    assert appended.reward_names == ["own"]
    assert isinstance(appended._reward_models[0], OwnModel)
    for wrong, message in (
        ([3], "A reward model needs a name"),
        (OwnModel(), "_reward_models must be a list"),
        ([OwnModel(), OwnModel()], "two rewards named 'own'"),
    ):
        with pytest.raises(ConfigError, match=message):
            KonicFinetuningAgent("gpt2", Own(wrong))
    with pytest.raises(ConfigError, match=r"kl_penalty_weight must be a number from 0 to"):
        composer._kl_penalty_weight = -1.0


def test_what_the_class_of_a_composer_of_konic_0_1_sets_counts():
    class Mixin:
        _kl_penalty_weight = 0.3

    class Own(Mixin, KonicLLMRewardComposer):
        _reward_models = [OwnModel()]  # noqa: RUF012
        _reward_weights = {"own": 2.0}  # noqa: RUF012

    class Later(Own):
        _kl_penalty_weight = 0.1

    class Computed(Own):
        @property
        def _kl_penalty_weight(self):
            return 0.2

    for kind, weight in ((Own, 0.3), (Later, 0.1), (Computed, 0.2)):
        composer = kind()
        assert KonicFinetuningAgent("gpt2", composer).kl_penalty_weight == weight
        assert (composer._kl_penalty_weight, composer.compose("p", "abc")) == (weight, 6.0)
    assert Own(kl_penalty_weight=0.5)._kl_penalty_weight == 0.5
    changed = Own(reward_weights={"own": 1.0})
    changed._reward_models.append(OwnModel())
    assert (changed._reward_weights, Own._reward_weights, len(Own._reward_models)) == ({"own": 1.0}, {"own": 2.0}, 1)
    with pytest.raises(ConfigError, match="kl_penalty_weight must be a number from 0 to 1e\\+15, got 'low'"):
        type("Wrong", (KonicLLMRewardComposer,), {"_kl_penalty_weight": "low"})
    with pytest.raises(ConfigError, match=r"Both has kl_penalty_weight and _kl_penalty_weight. Keep kl_penalty_weight"):
        type("Both", (KonicLLMRewardComposer,), {"_kl_penalty_weight": 0.1, "kl_penalty_weight": 0.2})
    with pytest.raises(ConfigError, match=r"reward_weights\['own'\] must be a finite number, got 'x'"):
        type("Text", (KonicLLMRewardComposer,), {"_reward_weights": {"own": "x"}})()


def test_a_subclass_of_the_weighted_sum_reads_its_weights():
    class Halved(WeightedSumReducer):
        def reduce(self, rewards):
            return sum(self._weights.get(name, self._default_weight) * value for name, value in rewards.items()) / 2

    assert KonicLLMRewardComposer([OwnModel()], {"own": 4.0}, Halved).compose("p", "abc") == 6.0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0.1, MaxReducer), {}), ((MaxReducer, 0.1), {}), ((0.1,), {"reducer": MaxReducer}), ((None, MaxReducer), {})],
)
def test_a_reducer_and_the_price_of_kl_are_told_apart(arguments, named):
    composer = KonicLLMRewardComposer([OwnModel()], None, *arguments, **named)
    assert composer.reducer is MaxReducer
    assert composer.kl_penalty_weight == (0.1 if 0.1 in arguments else None)


def test_a_named_reducer_that_is_none_is_refused_when_the_composer_is_made():
    for wrong in (3, 0.1, True, "mean"):
        with pytest.raises(RewardError, match=r"Composer\.reducer has no method reduce.* A reducer is a class or"):
            KonicLLMRewardComposer([OwnModel()], reducer=wrong)
    with pytest.raises(ConfigError, match="kl_penalty_weight must be a number"):
        KonicLLMRewardComposer([OwnModel()], kl_penalty_weight=MaxReducer)


def test_a_weight_for_a_reward_that_is_switched_off_is_a_warning(caplog):
    composer = LetterRewards(reward_weights={"leters": 2.0, "brief": 3.0})
    assert "LetterRewards has no reward 'leters'. Did you mean 'letters'?" in caplog.text
    assert "brief" not in caplog.text
    assert composer.compose("p", "ab") == pytest.approx(2 / 8 - 3 * 2 / 80)

    def later(prompt, response):
        return 1.0

    added = LetterRewards(reward_weights={"later": 5.0}).add_reward_function(later)
    assert added.compose("p", "") == 5.0


def test_the_weight_given_with_an_added_reward_counts_as_the_last_word(caplog):
    class Model:
        name = "model"

        def score(self, prompts, responses):
            return [10.0] * len(prompts)

    class Weighted(LetterRewards):
        reward_weights = {"model": 5.0, "later": 5.0}  # noqa: RUF012 - as scripts write it

    def later(prompt, response):
        return 1.0

    assert Weighted().add_reward_model(Model()).compose("p", "") == 50
    assert Weighted().add_reward_model(Model(), weight=0.0).compose("p", "") == 0
    assert Weighted().add_reward_model(Model(), 2.0).set_reward_weight("model", 3).compose("p", "") == 30
    assert Weighted().add_reward_function(later, weight=2.0).compose("p", "") == 2
    assert LetterRewards().add_reward_function(later).compose("p", "") == 1


@pytest.mark.parametrize("where", ["class", "object", "argument"])
def test_a_reducer_may_be_given_by_name(where):
    class Named(LetterRewards):
        reducer = "MaxReducer" if where == "class" else LetterRewards.reducer

    composer = Named(reducer="MaxReducer" if where == "argument" else None)
    if where == "object":
        composer.reducer = "MaxReducer"
    composer.check()
    assert composer.compose("p", "abcd") == 4 / 8
    assert composer.settings()["reducer"] == "MaxReducer"


def test_the_second_place_of_an_agent_of_konic_0_1_is_named():
    with pytest.raises(ConfigError, match=r"Name the arguments: .* environment, is gone"):
        KonicFinetuningAgent("gpt2", None, LetterRewards())


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
    assert [preset.kl_penalty_weight for preset in presets] == [0.0, TrainingConfig().kl_penalty_weight, 0.1]


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


PROMPTS = ("a film", "two films", "a long and winding film")
GENERATION = GenerationConfig(max_new_tokens=8, max_prompt_length=48)
SMALL = {
    "dataset_config": DatasetConfig(prompts=PROMPTS),
    "training_config": TrainingConfig(batch_size=8, learning_rate=1e-2, ppo_epochs=2),
    "generation_config": GENERATION,
}


def test_an_engine_of_parts_is_the_engine_of_an_agent_with_them(model_folders, tmp_path):
    lora = LoraConfig(r=4)
    one = KonicFinetuningEngine(
        model_name=model_folders["llama"], reward_composer=LetterRewards(), lora_config=lora, callback=Silent(),
        checkpoint_dir=str(tmp_path / "one"), device="cpu", method=KonicFinetuningMethodType.NATIVE_PPO, **SMALL,
    )  # fmt: skip
    agent = KonicFinetuningAgent(model_folders["llama"], LetterRewards(), lora, **SMALL)
    other = KonicFinetuningEngine.from_agent(agent, checkpoint_dir=tmp_path / "other", device="cpu", callback=Silent())
    for engine in (one, other):
        engine.setup()
        engine.train(1)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "other")
    same_tensors(weights(tmp_path / "one" / "final"), weights(tmp_path / "other" / "final"))
    assert one.model_name == model_folders["llama"]
    assert isinstance(one.reward_composer, LetterRewards)
    assert (one.lora_config, one.checkpoint_dir, one.device) == (lora, str(tmp_path / "one"), "cpu")
    assert (one.dataset_config, one.training_config.batch_size) == (SMALL["dataset_config"], 8)
    assert (one.generation_config, one.method, one.backend_name) == (GENERATION, "NATIVE_PPO", "konic ppo")


def test_an_engine_reads_its_settings_until_it_starts_and_then_keeps_them(model_folders, tmp_path):
    engine = make_engine(model_folders["llama"], tmp_path)
    engine.training_config.batch_size = 4
    engine.generation_config = {"max_new_tokens": 3, "max_prompt_length": 8}
    assert isinstance(KonicFinetuningEngine.from_agent(engine.agent).callback, KonicFinetuningCallback)
    assert engine.train(1).total_samples == 4
    engine.training_config.batch_size = 2
    assert engine.train(1).total_samples == 8
    with pytest.raises(ConfigError, match="has started and keeps its training_config"):
        engine.training_config = TrainingConfig()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": "gpt2"}, "needs a reward_composer"),
        ({"model_name": KonicFinetuningAgent("gpt2", LetterRewards())}, r"use from_agent\(agent\)"),
        ({"model_name": "gpt2", "reward_composer": LetterRewards(), "method": "TRL_DPO"}, "TRL_DPO is not offered"),
        ({"model_name": "gpt2", "reward_composer": LetterRewards(), "method": "RLHF"}, "'RLHF' is PPO"),
        ({"model_name": "gpt2", "reward_composer": LetterRewards(), "method": "SFT"}, "use NATIVE_PPO or TRL_GRPO"),
    ],
)
def test_what_an_engine_of_parts_cannot_be(arguments, message):
    with pytest.raises(ConfigError, match=message):
        KonicFinetuningEngine(**arguments)


def test_a_method_is_the_algorithm_of_that_name():
    engine = KonicFinetuningEngine("gpt2", LetterRewards(), method=KonicFinetuningMethodType.TRL_GRPO)
    assert engine.training_config.algorithm == "grpo"
    assert engine.method is KonicFinetuningMethodType.TRL_GRPO
    for batch, group in ((2, 2), (6, 3), (8, 4)):
        small = KonicFinetuningAgent("gpt2", LetterRewards(), training_config={"batch_size": batch}, method="TRL_GRPO")
        assert small.get_training_config().responses_per_prompt == group
    with pytest.raises(ConfigError, match="method='TRL_GRPO' is algorithm='grpo', but algorithm='rloo' is set"):
        KonicFinetuningAgent("gpt2", LetterRewards(), training_config={"algorithm": "rloo"}, method="TRL_GRPO")
    rloo = KonicFinetuningAgent("gpt2", LetterRewards(), training_config={"algorithm": "rloo"})
    assert rloo.get_finetuning_method() is None


def test_attributes_and_arguments_that_are_not_offered_name_their_successor():
    agent = KonicFinetuningAgent("gpt2", LetterRewards(), environment=None, module=None)
    assert agent.training_config is agent.get_training_config()
    engine = KonicFinetuningEngine.from_agent(agent)
    result = FinetuningResult("gpt2", [], 0.0, None)
    assert pickle.loads(pickle.dumps(result)) == copy.deepcopy(result) == result
    for thing, name, successor in (
        (agent, "get_module", "get_base_model"),
        (agent, "get_environment", "get_dataset_config"),
        (engine, "backend", "algorithm="),
        (engine, "module", "save_pretrained"),
        (LetterRewards(), "set_env", "columns of the dataset"),
        (LetterRewards(), "compute_kl_penalty", "kl_penalty_weight"),
        (LetterRewards(), "nothing", "no attribute 'nothing'"),
        (result, "get_loss_curves", "policy_loss"),
        (result, "lora_config", "engine.lora_config"),
        (result, "training_config", "engine.training_config"),
        (result, "add_iteration_result", "fills `history`"),
    ):
        assert not hasattr(thing, name)
        with pytest.raises(AttributeError, match=successor):
            getattr(thing, name)
    for wrong, message in (("environment", "dataset_config"), ("module", "base_model"), ("base_modl", "Did you mean")):
        with pytest.raises(ConfigError, match=f"has no argument '{wrong}'.*{message}"):
            KonicFinetuningAgent("gpt2", LetterRewards(), **{wrong: object()})


class OldAgent(BaseKonicFinetuningAgent):
    def __init__(self, folder):
        self.folder = folder

    def get_base_model(self):
        return self.folder

    def get_reward_composer(self):
        return LetterRewards()

    def get_dataset_config(self):
        return SMALL["dataset_config"]

    def get_training_config(self):
        return SMALL["training_config"]

    def get_generation_config(self):
        return GENERATION

    def get_lora_config(self):
        return {"r": 2}

    def get_finetuning_method(self):
        return KonicFinetuningMethodType.TRL_GRPO


def test_any_object_with_the_getters_is_an_agent(model_folders, tmp_path):
    class Begins(Silent):
        def on_train_begin(self, config):
            backends.append(config["backend"])

    backends = []
    engine = KonicFinetuningEngine.from_agent(
        OldAgent(model_folders["llama"]), checkpoint_dir=tmp_path, callback=Begins()
    )
    assert (engine.lora_config.r, engine.training_config.algorithm) == (2, "grpo")
    assert engine.train(1).total_samples == 8
    assert backends == ["konic grpo"]


class OwnGetters(KonicFinetuningAgent):
    """Like many agents of konic 0.1, it does not call `super().__init__()`."""

    def __init__(self, method=None):
        self.own_method = method

    def get_base_model(self):
        return "gpt2"

    def get_reward_composer(self):
        return LetterRewards()

    def get_training_config(self):
        return {"batch_size": 4}

    def get_finetuning_method(self):
        return self.own_method


def test_the_getters_of_a_subclass_count():
    engine = KonicFinetuningEngine.from_agent(OwnGetters(KonicFinetuningMethodType.TRL_GRPO))
    assert (engine.backend_name, engine.training_config.batch_size, engine.lora_config) == ("konic grpo", 4, None)
    assert KonicFinetuningEngine.from_agent(OwnGetters()).backend_name == "konic ppo"
    with pytest.raises(ConfigError, match="TRL_DPO is not offered"):
        KonicFinetuningEngine.from_agent(OwnGetters(KonicFinetuningMethodType.TRL_DPO))
    on_the_object = KonicFinetuningAgent("gpt2", LetterRewards())
    on_the_object.get_finetuning_method = lambda: KonicFinetuningMethodType.TRL_GRPO
    assert KonicFinetuningEngine.from_agent(on_the_object).backend_name == "konic grpo"
    with pytest.raises(ConfigError, match=r"OwnGetters.get_training_config\(\) makes its own config"):
        OwnGetters().with_settings({"training_config": {"seed": 1}})

    class Nothing(KonicFinetuningAgent):
        def __init__(self):
            pass

    with pytest.raises(ConfigError, match="base_model must name a model"):
        KonicFinetuningEngine.from_agent(Nothing())


def test_a_method_stays_where_a_config_does_not_set_another_algorithm():
    class OwnConfig(KonicFinetuningAgent):
        def get_training_config(self):
            return TrainingConfig(batch_size=4)

    engine = KonicFinetuningEngine.from_agent(OwnConfig("gpt2", LetterRewards(), method="TRL_GRPO"))
    engine.training_config = {"batch_size": 2}
    assert (engine.backend_name, engine.training_config.num_generations) == ("konic grpo", 2)
    engine.training_config = TrainingConfig(algorithm="rloo")
    assert engine.backend_name == "konic rloo"
    engine.method = KonicFinetuningMethodType.TRL_GRPO
    assert engine.method is KonicFinetuningMethodType.TRL_GRPO
    with pytest.raises(ConfigError, match="TRL_DPO is not offered"):
        engine.method = KonicFinetuningMethodType.TRL_DPO
    agent = OwnConfig("gpt2", LetterRewards(), method="TRL_GRPO").with_settings({"generation_config": {"top_k": 5}})
    assert KonicFinetuningEngine.from_agent(agent).backend_name == "konic grpo"


class OwnEngine(KonicFinetuningEngine):
    def __init__(self, model_name, reward_composer, callback=None, **parts):
        super().__init__(model_name=model_name, reward_composer=reward_composer, callback=callback or Silent(), **parts)
        self.mine = parts["training_config"].batch_size


def test_the_init_of_a_subclass_of_the_engine_is_called():
    agent = KonicFinetuningAgent(
        "gpt2", LetterRewards(), training_config={"batch_size": 4}, model_kwargs={"dtype": "float32"}
    )
    engine = OwnEngine.from_agent(agent, checkpoint_dir="run")
    assert (engine.mine, engine.checkpoint_dir, engine.callback.__class__) == (4, "run", Silent)
    assert engine.agent.get_model_kwargs() == {"dtype": "float32"}

    class TakesNone(KonicFinetuningEngine):
        def __init__(self, model_name):
            super().__init__(model_name, LetterRewards())

    with pytest.raises(ConfigError, match=r"TakesNone.from_agent.*its __init__ does not fit.*super\(\).__init__"):
        TakesNone.from_agent(agent)


def test_a_property_that_fails_shows_its_own_error():
    class Agent(KonicFinetuningAgent):
        @property
        def label(self):
            return self.nowhere

    with pytest.raises(AttributeError, match="no attribute 'nowhere'"):
        _ = Agent("gpt2", LetterRewards()).label


def test_the_base_classes_are_accepted():
    class Model(BaseRewardModel):
        name = "constant"

        def compute_reward(self, prompt, response, **more):
            return 3.0

    class Twice(Model):
        def batch_compute_reward(self, prompts, responses):
            return [6.0] * len(prompts)

        name = "twice"

    class Total(BaseRewardReducer):
        def __init__(self, weights=None):
            self.weights = weights

        def reduce(self, rewards):
            return sum(self.weights.get(name, 1.0) * value for name, value in rewards.items())

    class Composer(BaseKonicLLMRewardComposer):
        def compose(self, prompt, response):
            return float(len(response))

    models = KonicLLMRewardComposer([Model(), Twice()], {"constant": 2.0}, Total)
    assert models.compose("p", "r") == 2 * 3 + 6
    assert models.get_reward_breakdown("p", "r") == {"constant": 3.0, "twice": 6.0}
    KonicFinetuningAgent("gpt2", Composer())
    assert Composer().compose_batch(["p"], ["abc"]) == ([3.0], {})


REGISTERED = """
from konic.finetuning import *
from konic.runtime import register_agent
class Rewards(KonicLLMRewardComposer):
    @llm_reward
    def one(self, prompt, response):
        return 1.0
mine = KonicFinetuningAgent("gpt2", Rewards())
register_agent(mine, name="mine")
"""


def test_a_registered_agent_is_the_one_of_its_script(tmp_path):
    (tmp_path / "registers.py").write_text(REGISTERED)
    assert load_agent(tmp_path / "registers.py").get_base_model() == "gpt2"
    (tmp_path / "does_not.py").write_text("x = 1")
    with pytest.raises(ConfigError, match="defines neither"):
        load_agent(tmp_path / "does_not.py")
    runtime = importlib.import_module("konic.runtime")
    agent = KonicFinetuningAgent("gpt2", LetterRewards())
    assert runtime.register_agent(agent, name="x") is agent
    assert runtime.get_registered_agent()[0] is agent
    for wrong in ((KonicFinetuningAgent, "x"), (agent, "")):
        with pytest.raises(ConfigError, match="register_agent"):
            runtime.register_agent(*wrong)


@pytest.mark.parametrize("name", SUCCESSORS)
def test_a_name_that_is_not_offered_names_its_successor(name):
    module = "konic.runtime" if "data" in name.lower().split("_") or name == "DataDependency" else "konic.finetuning"
    with pytest.raises(ImportError) as error:
        exec(f"from {module} import {name}")
    assert f"konic 0.1 had {name}" in str(error.value)
    assert SUCCESSORS[name] in str(error.value)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_that_is_not_offered_names_its_successor(module):
    for name in (module, f"{module}.anything"):
        with pytest.raises(ImportError, match=f"konic 0.1 had the module {module}"):
            importlib.import_module(name)


@pytest.mark.parametrize("module", ["dataset", "reward", "engine"])
def test_names_that_are_not_offered_are_so_at_their_own_place(module):
    with pytest.raises(ImportError, match="had DatasetLoader"):
        exec(f"from konic.finetuning.{module} import DatasetLoader")
    with pytest.raises(ImportError, match="'nothing'"):
        exec(f"from konic.finetuning.{module} import nothing")


def test_errors_of_konic_0_1_are_caught():
    from konic.common.errors import KonicError, KonicValidationError

    with pytest.raises(KonicValidationError):
        TrainingConfig(learning_rate=-1.0)
    assert issubclass(KonicValidationError, KonicError)
