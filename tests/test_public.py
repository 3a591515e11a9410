"""The public surface: names, what they accept, and that nothing else is required of a user's script."""

import dataclasses
import inspect

import konic.finetuning as public

NAMES = """
BaseKonicFinetuningAgent BaseKonicFinetuningCallback BaseKonicLLMRewardComposer BaseRewardModel BaseRewardReducer
CompositeCallback ConfigError DatasetConfig DatasetError DatasetSource FinetuningIterationResult
FinetuningResult GenerationConfig HuggingFaceRewardModel KonicError KonicFinetuningAgent KonicFinetuningCallback
KonicFinetuningEngine KonicFinetuningMethodType KonicLLMRewardComposer LoraConfig
MLflowCallback MaxReducer MeanReducer ModelError OutputError RemoteRewardModel RewardError
SamplerError TensorBoardCallback TrackioCallback TrainingConfig TrainingError WandbCallback WeightedSumReducer
llm_reward
""".split()

RESULT_FIELDS = """
iteration reward_mean reward_std reward_min reward_max kl_divergence policy_loss value_loss entropy_loss total_loss
response_length_mean response_length_std learning_rate clip_fraction approx_kl explained_variance reward_breakdown
generation_time_sec reward_compute_time_sec update_time_sec total_time_sec
""".split()


def test_the_public_names_are_these_sorted():
    assert public.__all__ == NAMES == sorted(NAMES)
    assert all(getattr(public, name) for name in NAMES)


def test_every_public_name_is_documented():
    for name in NAMES:
        thing = getattr(public, name)
        assert thing.__doc__, name
        for attribute, member in vars(thing).items():
            if inspect.isfunction(member) and not attribute.startswith("_"):
                assert member.__doc__, f"{name}.{attribute}"


def defaults(function):
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }


def test_signatures_are_the_contracts():
    engine, callback = public.KonicFinetuningEngine, public.KonicFinetuningCallback
    promised = {"max_iterations": 100, "save_every": None, "resume_from_checkpoint": None}
    assert defaults(engine.train) == promised | {"save_total_limit": None, "allow_changes": False}
    assert list(inspect.signature(engine.train).parameters)[1:4] == list(promised)
    assert defaults(engine.save_pretrained) == {"merge": False}
    assert defaults(callback.__init__) == {
        "log_interval": 1,
        "log_samples": False,
        "max_samples_to_log": 3,
        "use_mlflow": False,
        "early_stop_kl_threshold": None,
        "early_stop_patience": 5,
        "verbose": True,
    }
    composer = inspect.signature(public.KonicLLMRewardComposer.__init__).parameters
    assert list(composer)[1:] == ["reward_models", "reward_weights", "reducer", "kl_penalty_weight", "reward_functions"]
    agent = inspect.signature(public.KonicFinetuningAgent.__init__).parameters
    expected = "base_model reward_composer lora_config dataset_config training_config generation_config model_kwargs"
    assert list(agent)[1:] == [*expected.split(), "method", "unknown"]
    parts = "model_name reward_composer dataset_config lora_config training_config generation_config callback"
    started = inspect.signature(engine.__init__).parameters
    assert list(started)[1:] == f"{parts} checkpoint_dir device method unknown".split()


def test_config_defaults_are_the_contracts():
    training = public.TrainingConfig()
    expected = {
        "learning_rate": None, "batch_size": 16, "gradient_accumulation_steps": 1, "ppo_epochs": 4,
        "num_minibatches": 1,
        "kl_penalty_weight": 0.05, "clip_ratio": 0.2, "vf_coef": 0.1, "entropy_coef": 0.0, "gamma": 1.0,
        "gae_lambda": 0.95, "max_grad_norm": 1.0, "weight_decay": 0.0, "warmup_steps": 0,
        "lr_scheduler": "inverse_sqrt",
        "missing_eos_penalty": None, "gradient_checkpointing": False, "max_minutes": None,
    }  # fmt: skip
    assert {name: getattr(training, name) for name in expected} == expected
    generation = public.GenerationConfig()
    expected = {
        "max_new_tokens": 48, "min_new_tokens": 1, "max_prompt_length": 256, "temperature": 1.0, "top_p": 1.0,
        "top_k": 0, "do_sample": True, "repetition_penalty": 1.0, "stop": None, "eos_token_id": None,
        "pad_token_id": None,
    }  # fmt: skip
    assert {name: getattr(generation, name) for name in expected} == expected
    data = public.DatasetConfig(source=public.DatasetSource.BUNDLED)
    expected = {
        "prompt_column": "prompt", "split": "train", "max_samples": None, "shuffle": True, "shuffle_seed": 42,
        "held_out": 0,
    }  # fmt: skip
    assert {name: getattr(data, name) for name in expected} == expected


def test_results_have_the_contracts_fields():
    assert set(RESULT_FIELDS) <= {field.name for field in dataclasses.fields(public.FinetuningIterationResult)}
    whole = """total_iterations best_iteration best_reward final_reward_mean final_kl_divergence total_samples
    total_time_sec model_path history""".split()
    result = public.FinetuningResult("m", [], 0.0, None)
    assert all(hasattr(result, name) for name in whole)


def test_hooks_take_what_the_contract_says():
    hooks = {
        "on_train_begin": ["config"],
        "on_iteration_begin": ["iteration"],
        "on_generation_begin": ["prompts"],
        "on_generation_end": ["prompts", "responses"],
        "on_reward_computed": ["rewards", "reward_breakdown"],
        "on_iteration_end": ["result"],
        "on_checkpoint_saved": ["path", "iteration"],
        "on_train_end": ["result"],
        "should_stop_early": ["result"],
    }
    for name, parameters in hooks.items():
        found = inspect.signature(getattr(public.BaseKonicFinetuningCallback, name)).parameters
        assert list(found)[1:] == parameters
