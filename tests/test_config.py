import math

import numpy as np
import pytest
import torch
from transformers import GenerationConfig as TransformersGenerationConfig

from konic.finetuning.algorithms import ALGORITHMS
from konic.finetuning.config import GenerationConfig, LoraConfig, TrainingConfig
from konic.finetuning.data.config import DatasetConfig
from konic.finetuning.errors import ConfigError

CONTRACT = {
    TrainingConfig: {
        "learning_rate": None, "batch_size": 16, "gradient_accumulation_steps": 1, "ppo_epochs": 4,
        "num_minibatches": 1,
        "kl_penalty_weight": 0.05, "clip_ratio": 0.2, "vf_coef": 0.1, "entropy_coef": 0.0, "gamma": 1.0,
        "gae_lambda": 0.95, "max_grad_norm": 1.0, "weight_decay": 0.0, "warmup_steps": 0,
        "lr_scheduler": "inverse_sqrt",
        "missing_eos_penalty": None, "gradient_checkpointing": False, "max_minutes": None,
    },
    GenerationConfig: {
        "max_new_tokens": 48, "min_new_tokens": 1, "max_prompt_length": 256, "temperature": 1.0, "top_p": 1.0,
        "top_k": 0, "do_sample": True, "repetition_penalty": 1.0, "stop": None, "eos_token_id": None,
        "pad_token_id": None,
    },
    DatasetConfig: {
        "prompt_column": "prompt", "split": "train", "max_samples": None, "shuffle": True, "shuffle_seed": 42,
        "held_out": 0,
    },
}  # fmt: skip

TINY = 1e-12
BOUNDS = [  # field, the values at the edge that are valid, the ones past it
    (TrainingConfig, "algorithm", list(ALGORITHMS), ["PPO", "reinforce", None]),
    (TrainingConfig, "num_generations", [1, 4, None], [0, -1, 1.5]),
    (TrainingConfig, "kl_placement", ["reward", "loss", None], ["both"]),
    (TrainingConfig, "kl_target", [TINY, None], [0]),
    (TrainingConfig, "kl_horizon", [1], [0]),
    (TrainingConfig, "kl_limit", [TINY, None], [0]),
    (TrainingConfig, "kl_budget", [TINY, None], [0]),
    (TrainingConfig, "target_kl", [TINY, None], [0]),
    (TrainingConfig, "value_warmup_iterations", [0, 3], [-1]),
    (TrainingConfig, "on_reward_error", ["raise", "skip"], ["ignore", None]),
    (TrainingConfig, "on_nonfinite", ["stop", "skip"], ["raise", None]),
    (TrainingConfig, "max_error_rate", [0, 1], [-TINY, 1.001]),
    (TrainingConfig, "reward_workers", [0, 4], [-1, 1.5]),
    (TrainingConfig, "reward_timeout_seconds", [TINY, 1e6, None], [0, 1e12]),
    (TrainingConfig, "reward_resources", [{}, {"CPU": 0, "GPU": 0.5}, None], ["CPU", 4]),
    (TrainingConfig, "process_timeout_seconds", [TINY, 1800, 1e6], [0, 1e12]),
    (TrainingConfig, "self_checks", [True, False], ["perhaps", None]),
    (TrainingConfig, "learning_rate", [TINY, None], [0, -1e-5]),
    (TrainingConfig, "batch_size", [1], [0, -4]),
    (TrainingConfig, "gradient_accumulation_steps", [1, 4], [0]),
    (TrainingConfig, "ppo_epochs", [1], [0]),
    (TrainingConfig, "num_minibatches", [1, 2], [0]),
    (TrainingConfig, "kl_penalty_weight", [0], [-TINY, 1e30]),
    (TrainingConfig, "clip_ratio", [TINY, 0.999], [0, 1, -0.2, 1.5]),
    (TrainingConfig, "clip_ratio_low", [TINY, 1, None], [0, 1.001, -0.2]),
    (TrainingConfig, "clip_ratio_high", [TINY, 4, None], [0, -0.2]),
    (TrainingConfig, "vf_coef", [0], [-TINY]),
    (TrainingConfig, "entropy_coef", [0], [-TINY]),
    (TrainingConfig, "gamma", [TINY, 1], [0, 1.001]),
    (TrainingConfig, "gae_lambda", [0, 1], [-TINY, 1.001]),
    (TrainingConfig, "max_grad_norm", [TINY], [0]),
    (TrainingConfig, "weight_decay", [0], [-TINY]),
    (TrainingConfig, "warmup_steps", [0], [-1]),
    (TrainingConfig, "lr_scheduler", ["constant", "inverse_sqrt", "linear", "cosine"], ["cosin", None]),
    (TrainingConfig, "missing_eos_penalty", [0, None], [-TINY, 1e20]),
    (TrainingConfig, "divergence_limit", [TINY, None], [0]),
    (TrainingConfig, "divergence", ["total_variation", "kl"], ["tv", None]),
    (TrainingConfig, "gae_lambda_length", [TINY, None], [0]),
    (TrainingConfig, "value_gae_lambda", [0, 1, None], [-TINY, 1.001]),
    (TrainingConfig, "overlong_penalty", [0], [-TINY, 1e300, None]),
    (TrainingConfig, "overlong_share", [TINY, 1], [0, 1.001]),
    (TrainingConfig, "filter_equal_groups", [False], ["perhaps", None, True]),  # True needs num_generations
    (TrainingConfig, "resampling_budget", [0, 9], [-1, 1.5]),
    (TrainingConfig, "sampler_correction", ["truncate", "mask", None], ["clip", True]),
    (TrainingConfig, "sampler_correction_level", ["token", "sequence"], ["batch", None]),
    (TrainingConfig, "sampler_correction_limit", [1 + TINY], [1, 0]),
    (TrainingConfig, "mask_truncated", [True, False], ["perhaps", None]),
    (TrainingConfig, "gradient_checkpointing", [True, False], ["perhaps", None]),
    (TrainingConfig, "sharding", ["fsdp", None], ["ddp", True]),
    (TrainingConfig, "sharded_sampling", [None], ["perhaps", True]),  # True needs sharding
    (TrainingConfig, "precision", ["float32", "bfloat16", "auto"], ["bf16", "float16", None]),
    (TrainingConfig, "eval_every", [1, None], [0, -1, 1.5]),
    (TrainingConfig, "max_minutes", [TINY, None], [0]),
    (TrainingConfig, "seed", [0, 2**63 - 1], [-1, 2**63]),
    (GenerationConfig, "max_new_tokens", [1], [0]),
    (GenerationConfig, "min_new_tokens", [0, 48], [-1, 49]),
    (GenerationConfig, "max_prompt_length", [1], [0]),
    (GenerationConfig, "temperature", [TINY], [0, -1]),
    (GenerationConfig, "top_p", [TINY, 1], [0, 1.001]),
    (GenerationConfig, "top_k", [0], [-1]),
    (GenerationConfig, "skip_special_tokens", [True, False], ["perhaps", None]),
    (GenerationConfig, "decode_layout", ["auto", "plain", "onednn", "mkl", None], ["packed"]),
    (GenerationConfig, "do_sample", [True, False], ["perhaps", None]),
    (GenerationConfig, "repetition_penalty", [TINY], [0]),
    (GenerationConfig, "stop", [None, ("a", "b")], [("a", ""), (1,)]),
    (GenerationConfig, "eos_token_id", [0, None, (0, 1)], ["two", 1.5]),
    (GenerationConfig, "pad_token_id", [0, None], [-1]),
    (GenerationConfig, "engine", ["local"], ["vlm", None]),
    (GenerationConfig, "vllm_address", [None], [3]),
    (GenerationConfig, "vllm_python", [None], [3]),
    (GenerationConfig, "vllm_arguments", [()], [(1,), "--seed=1"]),
    (GenerationConfig, "vllm_folder", [None], [3]),
    (GenerationConfig, "vllm_timeout_seconds", [TINY], [0, 1e12]),
    (LoraConfig, "r", [1], [0]),
    (LoraConfig, "lora_alpha", [TINY], [0]),
    (LoraConfig, "lora_dropout", [0, 0.999], [-TINY, 1]),
    (LoraConfig, "target_modules", [None, "all-linear", ("q_proj",)], [3]),
    (LoraConfig, "bias", ["none", "all", "lora_only"], ["some", None]),
    (LoraConfig, "task_type", ["CAUSAL_LM"], ["SEQ_CLS"]),
    (LoraConfig, "fan_in_fan_out", [True, False, None], ["perhaps"]),
    (DatasetConfig, "max_samples", [1, None], [0]),
    (DatasetConfig, "shuffle_seed", [0, 2**63 - 1], [-1, 2**63]),
    (DatasetConfig, "held_out", [0], [-1]),
]
VALID = [(kind, field, value) for kind, field, good, _ in BOUNDS for value in good]
INVALID = [(kind, field, value) for kind, field, _, bad in BOUNDS for value in bad]
FLOATS = [(kind, field) for kind, field, good, bad in BOUNDS if TINY in good or -TINY in bad]


@pytest.mark.parametrize("kind", CONTRACT)
def test_defaults_are_those_of_the_public_contract(kind):
    config = kind()
    assert {name: getattr(config, name) for name in CONTRACT[kind]} == CONTRACT[kind]


@pytest.mark.parametrize("kind", [TrainingConfig, GenerationConfig, LoraConfig])
def test_every_field_has_its_bounds_tested(kind):
    assert set(kind.model_fields) == {field for tested, field, *_ in BOUNDS if tested is kind}


@pytest.mark.parametrize(("kind", "field", "value"), VALID)
def test_a_value_at_the_edge_is_taken(kind, field, value):
    companions = {"batch_size": 8} if field in ("num_minibatches", "gradient_accumulation_steps") else {}
    companions |= {"reward_workers": 1} if field in ("reward_timeout_seconds", "reward_resources") else {}
    assert getattr(kind(**companions, **{field: value}), field) == value


@pytest.mark.parametrize(("amount", "problem"), [(-1, "at least 0, got -1"), ("many", "a number, got 'many'")])
def test_an_amount_of_a_resource_that_cannot_be_is_refused(amount, problem):
    with pytest.raises(ConfigError, match=f"reward_resources: it must be {problem}"):
        TrainingConfig(reward_workers=1, reward_resources={"CPU": amount})


@pytest.mark.parametrize(("kind", "field", "value"), INVALID)
def test_a_value_past_the_edge_is_refused_by_name_and_shown(kind, field, value):
    with pytest.raises(ConfigError) as error:
        kind(**{field: value})
    assert kind.__name__ in str(error.value)
    assert field in str(error.value)
    if not isinstance(value, tuple):
        assert repr(value) in str(error.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "field"), FLOATS)
def test_nan_and_infinities_are_refused(kind, field, value):
    with pytest.raises(ConfigError, match=f"{kind.__name__}.{field}"):
        kind(**{field: value})


@pytest.mark.parametrize(
    ("kind", "misspelt", "meant"),
    [
        (TrainingConfig, "learning_rat", "learning_rate"),
        (TrainingConfig, "num_minibatch", "num_minibatches"),
        (GenerationConfig, "max_new_token", "max_new_tokens"),
        (LoraConfig, "lora_alfa", "lora_alpha"),
        (DatasetConfig, "prompt_colum", "prompt_column"),
    ],
)
def test_a_misspelt_field_is_answered_with_the_one_meant(kind, misspelt, meant):
    with pytest.raises(ConfigError, match=f"{kind.__name__} has no field '{misspelt}'. Did you mean '{meant}'"):
        kind(**{misspelt: 1})


def test_a_field_like_no_other_is_answered_with_all_of_them():
    with pytest.raises(ConfigError) as error:
        LoraConfig(zzz=1)
    assert all(field in str(error.value) for field in LoraConfig.model_fields)


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(ConfigError) as error:
        TrainingConfig(gamma=2, clip_ratio=0, ppo_epoch=1)
    assert [name in str(error.value) for name in ("gamma", "clip_ratio", "ppo_epochs")] == [True] * 3


def test_a_config_error_is_also_a_value_error_without_pydantics_trace():
    with pytest.raises(ValueError, match="gamma") as error:
        TrainingConfig(gamma=2)
    assert error.value.__suppress_context__
    assert "pydantic" not in str(error.value)


@pytest.mark.parametrize(("batch", "minibatches", "nearest"), [(7, 2, "6 or 8"), (4, 3, "3 or 6"), (1, 2, "2")])
def test_what_does_not_divide_is_refused_with_the_nearest_valid_value(batch, minibatches, nearest):
    with pytest.raises(ConfigError) as error:
        TrainingConfig(batch_size=batch, num_minibatches=minibatches)
    message = str(error.value)
    assert f"batch_size={batch}" in message
    assert f"num_minibatches={minibatches}" in message
    assert message.endswith(f"nearest valid batch_size: {nearest}.")


@pytest.mark.parametrize(("batch", "accumulation", "at_once"), [(2, 4, 1), (7, 2, 4), (6, 4, 2), (1, 9, 1), (8, 8, 1)])
def test_every_batch_size_goes_with_every_number_of_micro_batches(batch, accumulation, at_once):
    config = TrainingConfig(batch_size=batch, gradient_accumulation_steps=accumulation)
    assert config.micro_batch_size == at_once
    assert config.effective_batch_size == batch


@pytest.mark.parametrize(("default", "batch", "minibatches"), [(2, 1, 1), (2, 3, 1), (2, 8, 2), (4, 6, 2)])
def test_the_default_number_of_minibatches_goes_with_every_batch_size(default, batch, minibatches, monkeypatch):
    monkeypatch.setattr("konic.finetuning.training_config.DEFAULT_NUM_MINIBATCHES", default)
    assert TrainingConfig(batch_size=batch).num_minibatches == minibatches


def test_derived_sizes():
    config = TrainingConfig(batch_size=24, num_minibatches=2, gradient_accumulation_steps=3, ppo_epochs=5)
    assert config.micro_batch_size == 4
    assert config.steps_per_iteration == 10


@pytest.mark.parametrize("kind", [TrainingConfig, GenerationConfig, LoraConfig, DatasetConfig])
def test_a_value_that_is_assigned_is_validated(kind):
    config = kind()
    for field in kind.model_fields:
        setattr(config, field, getattr(config, field))
    with pytest.raises(ConfigError, match=f"{kind.__name__} has no field 'something_new'"):
        config.something_new = 1
    assert config == kind()


def test_an_assigned_value_counts_for_the_others_too():
    config = TrainingConfig(batch_size=8, num_minibatches=4)
    config.algorithm = "dapo"
    assert config.kl_penalty_weight == 0
    with pytest.raises(ConfigError, match="batch_size=6 cannot be split"):
        config.batch_size = 6
    with pytest.raises(ConfigError, match=r"batch_size: it must be at least 1, got 0\.$"):
        config.batch_size = 0  # and nothing about the defaults that depend on it
    assert (config.batch_size, config.micro_batch_size) == (8, 2)
    data = DatasetConfig()
    data.name = "imdb"
    assert data.source == "huggingface"


@pytest.mark.parametrize("kind", [TrainingConfig, GenerationConfig, LoraConfig, DatasetConfig])
def test_from_value_takes_none_a_mapping_or_an_instance(kind):
    config = kind()
    assert kind.from_value(None) == config
    assert kind.from_value({}) == config
    assert kind.from_value(config) is config


def test_from_value_reads_a_mappings_fields_and_checks_them():
    assert TrainingConfig.from_value({"batch_size": 8}) == TrainingConfig(batch_size=8)
    with pytest.raises(ConfigError, match="batch_size"):
        TrainingConfig.from_value({"batch_size": 0})


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (3, "int 3"),
        ("batch_size=8", "str 'batch_size=8'"),
        ([("token", "hf_secret")], r"list\. Write TrainingConfig\(algorithm=\.\.\.\)\.$"),
        (GenerationConfig(), r"GenerationConfig\."),
        (TransformersGenerationConfig(), r"transformers\..*GenerationConfig\."),
        (TrainingConfig, r"the class TrainingConfig: add \(\)"),
    ],
)
def test_from_value_refuses_anything_else_and_names_what_it_is(value, told):
    with pytest.raises(
        ConfigError, match=f"training_config must be a TrainingConfig or a dict of its fields, got {told}"
    ):
        TrainingConfig.from_value(value)


@pytest.mark.parametrize(
    ("values", "filters"),
    [
        ({}, []),
        ({"temperature": 0.7, "min_new_tokens": 1, "stop": "."}, []),
        ({"min_new_tokens": 0}, []),
        ({"min_new_tokens": 2}, ["min_new_tokens=2"]),
        ({"top_p": 0.9}, ["top_p=0.9"]),
        ({"top_k": 50}, ["top_k=50"]),
        ({"repetition_penalty": 1.2}, ["repetition_penalty=1.2"]),
        ({"do_sample": False}, ["do_sample=False"]),
        ({"top_k": 5, "top_p": 0.5, "repetition_penalty": 0.9, "do_sample": False, "min_new_tokens": 3},
         ["do_sample=False", "min_new_tokens=3", "repetition_penalty=0.9", "top_k=5", "top_p=0.5"]),
    ],
)  # fmt: skip
def test_distribution_filters_name_what_makes_samples_differ_from_the_policy(values, filters):
    assert sorted(GenerationConfig(**values).distribution_filters) == filters


def test_lengths_that_contradict_are_refused():
    with pytest.raises(ConfigError, match="min_new_tokens=9 is above max_new_tokens=8"):
        GenerationConfig(min_new_tokens=9, max_new_tokens=8)


@pytest.mark.parametrize(
    ("stop", "kept"), [("###", ("###",)), (["a", "b"], ("a", "b")), (("a",), ("a",)), (None, None)]
)
def test_stop_may_be_one_string_or_several(stop, kept):
    assert GenerationConfig(stop=stop).stop == kept


@pytest.mark.parametrize("stop", ["", ["a", ""]])
def test_an_empty_stop_string_is_refused(stop):
    with pytest.raises(ConfigError, match="empty string"):
        GenerationConfig(stop=stop)


def test_the_peak_learning_rate_is_the_users_or_the_modes():
    config = TrainingConfig(learning_rate=3e-4)
    assert config.peak_learning_rate(uses_lora=True) == config.peak_learning_rate(uses_lora=False) == 3e-4
    lora, full = (TrainingConfig().peak_learning_rate(uses_lora=uses_lora) for uses_lora in (True, False))
    assert lora > full > 0


def test_a_rate_of_ones_own_stays_as_it_is_and_the_default_one_falls():
    assert TrainingConfig().lr_scheduler == TrainingConfig(learning_rate=None).lr_scheduler == "inverse_sqrt"
    assert TrainingConfig(learning_rate=1e-3).lr_scheduler == "constant"
    assert TrainingConfig(learning_rate=1e-3, lr_scheduler="inverse_sqrt").lr_scheduler == "inverse_sqrt"
    assert TrainingConfig().with_fields({"learning_rate": 1e-3}).lr_scheduler == "constant"


def test_target_modules_may_be_a_list():
    assert LoraConfig(target_modules=["q_proj", "v_proj"]).target_modules == ("q_proj", "v_proj")


@pytest.mark.parametrize("ids", [-1, (), (3, -1)])
def test_end_tokens_must_be_tokens(ids):
    with pytest.raises(ConfigError, match="eos_token_id"):
        GenerationConfig(eos_token_id=ids)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"algorithm": "grpo", "num_generations": 1}, "num_generations must be at least 2"),
        ({"algorithm": "rloo", "batch_size": 6}, "groups of num_generations=4; nearest valid batch_size: 4 or 8"),
        ({"batch_size": 6, "num_generations": 4, "num_minibatches": 3}, "num_generations=4; .*batch_size: 12"),
        ({"batch_size": 8, "num_generations": 4, "num_minibatches": 3}, "num_minibatches=3; .*batch_size: 12"),
        ({"algorithm": "grpo", "value_warmup_iterations": 1}, "algorithm='grpo' .* no value head learns"),
        ({"kl_target": 6.0, "kl_budget": 5.0}, "kl_target=6.0 steers beyond kl_budget=5.0"),
        (
            {"algorithm": "gdpo", "kl_placement": "reward"},
            "looks at the parts .* kl_placement='reward'",
        ),
        ({"algorithm": "gdpo", "missing_eos_penalty": 1.0}, "takes neither .* nor missing_eos_penalty"),
        ({"algorithm": "max_rl", "kl_placement": "reward"}, "divides by the mean .* it takes neither kl_placement"),
        ({"algorithm": "max_rl", "overlong_penalty": 1.0}, "it takes neither .* nor overlong_penalty"),
        ({"algorithm": "dapo", "clip_ratio": 0.05}, r"clip_ratio=0\.05 would change nothing: .*'dapo' clips by 0\.2"),
        ({"algorithm": "cispo", "clip_ratio": 0.3, "clip_ratio_low": 0.1}, "Set clip_ratio_low and clip_ratio_high"),
        ({"algorithm": "sapo", "clip_ratio": 0.3}, "algorithm='sapo' does not clip: leave clip_ratio, clip_ratio_low"),
        ({"algorithm": "dppo", "clip_ratio_high": 0.3}, "algorithm='dppo' does not clip"),
        ({"vf_coef": 0, "value_warmup_iterations": 1}, "vf_coef=0.0 no value head learns"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_with_the_way_out(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**values)


@pytest.mark.parametrize(
    ("values", "clips"),
    [
        ({}, (0.2, 0.2)),
        ({"clip_ratio": 0.3}, (0.3, 0.3)),
        ({"clip_ratio_high": 0.28}, (0.2, 0.28)),
        ({"clip_ratio_low": 0.1, "clip_ratio": 0.3}, (0.1, 0.3)),
        ({"algorithm": "gspo"}, (3e-4, 4e-4)),
        ({"algorithm": "gspo", "clip_ratio_high": 1e-3}, (3e-4, 1e-3)),
        ({"algorithm": "dapo", "clip_ratio": 0.05, "clip_ratio_low": 0.1, "clip_ratio_high": 0.3}, (0.1, 0.3)),
        ({"algorithm": "cispo"}, (1.0, 4.0)),
    ],
)
def test_a_clip_is_the_one_set_for_its_side_else_the_algorithms_else_the_general_one(values, clips):
    assert TrainingConfig(**values).clip_ratios == clips


@pytest.mark.parametrize(
    ("values", "group", "prompts"),
    [({}, 1, 8), ({"algorithm": "reinforce++"}, 1, 8), ({"algorithm": "rloo"}, 4, 2), ({"algorithm": "grpo"}, 4, 2),
     ({"algorithm": "dr_grpo", "num_generations": 2}, 2, 4), ({"num_generations": 8}, 8, 1)],
)  # fmt: skip
def test_the_batch_is_so_many_prompts_with_so_many_responses_each(values, group, prompts):
    config = TrainingConfig(batch_size=8, **values)
    assert (config.responses_per_prompt, config.prompts_per_iteration) == (group, prompts)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: TrainingConfig(lr=3e-4), "has no field 'lr'. Here it is learning_rate."),
        (lambda: TrainingConfig(temperature=0.7), "It is GenerationConfig(temperature=...)."),
        (lambda: GenerationConfig(max_completion_length=9), "Here it is max_new_tokens."),
        (lambda: TrainingConfig(1e-4), "takes its fields by name, TrainingConfig(algorithm=...), got 0.0001."),
        (lambda: TrainingConfig(algorithm="GRPO"), "got 'GRPO'. Did you mean 'grpo'?"),
        (
            lambda: TrainingConfig(learning_rate="fast"),
            "TrainingConfig.learning_rate: it must be a number, got 'fast'.",
        ),
        (lambda: TrainingConfig(batch_size=2.5), "TrainingConfig.batch_size: it must be a whole number, got 2.5."),
        (lambda: TrainingConfig(gamma=2), "TrainingConfig.gamma: it must be at most 1, got 2."),
        (lambda: LoraConfig(target_modules=3), "LoraConfig.target_modules: it must be a list or text, got 3."),
        (lambda: DatasetConfig(prompts="abc"), "prompts is of the type str, which is not a list of rows: 'abc'."),
        (lambda: DatasetConfig(shuffle="perhaps"), "DatasetConfig.shuffle: it must be True or False, got 'perhaps'."),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_wanted(make, told):
    with pytest.raises(ConfigError) as caught:
        make()
    message = str(caught.value)
    assert told in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        (TrainingConfig, {"batch_size": True}, "TrainingConfig.batch_size: it must be a number, got True"),
        (TrainingConfig, {"learning_rate": False}, "learning_rate: it must be a number, got False"),
        (GenerationConfig, {"eos_token_id": True}, "eos_token_id: it must be a number, got True"),
        (GenerationConfig, {"eos_token_id": [0, True]}, r"eos_token_id: it must be a number, got \[0, True\]"),
        (LoraConfig, {"r": True}, "LoraConfig.r: it must be a number"),
        (
            TrainingConfig,
            {"batch_size": np.bool_(True)},
            "TrainingConfig.batch_size: it must be a number, got np.True_",
        ),
        (TrainingConfig, {"learning_rate": np.array(True)}, "learning_rate: it must be a number"),
        (TrainingConfig, {"gamma": torch.tensor(True)}, "gamma: it must be a number"),
        (GenerationConfig, {"eos_token_id": [0, np.False_]}, "eos_token_id: it must be a number"),
        (GenerationConfig, {"temperature": np.False_}, "temperature: it must be a number"),
        (DatasetConfig, {"shuffle_seed": np.True_}, "shuffle_seed: it must be a number"),
        (LoraConfig, {"lora_alpha": np.True_}, "lora_alpha: it must be a number"),
    ],
)
def test_a_truth_value_is_no_number(kind, fields, told):
    with pytest.raises(ConfigError, match=told):
        kind(**fields)
    assert TrainingConfig(gradient_checkpointing=True).gradient_checkpointing


HALF = "a\ud800"


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (DatasetConfig, {"prompts": ["x"], "system_prompt": HALF}),
        (DatasetConfig, {"prompts": ["x"], "prompt_column": HALF}),
        (DatasetConfig, {"prompts": ["x"], "prompt_template": "{x}" + HALF}),
        (DatasetConfig, {"prompts": ["x"], "weights_column": HALF}),
        (DatasetConfig, {"prompts": ["x"], "chat_template_kwargs": {"a": [{"b": HALF}]}}),
        (DatasetConfig, {"prompts": ["x"], "chat_template_kwargs": {HALF: 1}}),
        *((DatasetConfig, {"name": "a/b", name: HALF}) for name in ("subset", "split", "revision", "token", "source")),
        (DatasetConfig, {"name": HALF}),
        (GenerationConfig, {"stop": [HALF]}),
        (TrainingConfig, {"algorithm": HALF}),
        (LoraConfig, {"target_modules": HALF}),
        (LoraConfig, {"target_modules": ["q_proj", HALF]}),
    ],
)
def test_text_with_half_a_character_is_refused_by_name(kind, fields):
    name = next(name for name, value in fields.items() if value not in (["x"], "a/b"))
    with pytest.raises(
        ConfigError, match=rf"{kind.__name__}\.{name}: it must be valid text, without half a char"
    ) as told:
        kind(**fields)
    assert name != "token" or HALF not in str(told.value)


def test_text_that_is_assigned_is_checked_too():
    config = GenerationConfig()
    with pytest.raises(ConfigError, match=r"GenerationConfig\.stop: it must be valid text"):
        config.stop = [HALF]


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (DatasetConfig, {"name": b"a.csv"}),
        (DatasetConfig, {"prompts": ["x"], "system_prompt": b"Be kind."}),
        (GenerationConfig, {"stop": [b"x"]}),
        (LoraConfig, {"target_modules": bytearray(b"x")}),
    ],
)
def test_bytes_are_no_text(kind, fields):
    with pytest.raises(ConfigError, match=rf"{kind.__name__}\.{list(fields)[-1]}: it must be text, got"):
        kind(**fields)


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        (TrainingConfig, "max_iterations", r"It is engine\.train\(max_iterations=\.\.\.\)"),
        (TrainingConfig, "max_steps", r"It is engine\.train\(max_iterations"),
        (TrainingConfig, "output_dir", r"from_agent\(agent, checkpoint_dir"),
        (TrainingConfig, "bf16", r"TrainingConfig\(precision=.bfloat16.\)"),
        (GenerationConfig, "device", r"from_agent\(agent, device"),
        (DatasetConfig, "base_model", r"KonicFinetuningAgent\(base_model"),
        (LoraConfig, "modules_to_save", r"pass peft\.LoraConfig"),
        (LoraConfig, "use_rslora", r"pass peft\.LoraConfig"),
    ],
)
def test_a_name_that_is_given_elsewhere_says_where(kind, name, told):
    with pytest.raises(ConfigError, match=told):
        kind(**{name: 3})


@pytest.mark.parametrize(
    ("kind", "field", "given"),
    [(TrainingConfig, "max_grad_norm", 0)]
    + [(TrainingConfig, name, None) for name in ("max_grad_norm", "weight_decay", "entropy_coef", "warmup_steps")]
    + [(GenerationConfig, name, None) for name in ("top_p", "top_k", "repetition_penalty", "min_new_tokens")],
)
def test_none_as_other_libraries_take_it_is_answered_with_the_number_to_set(kind, field, given):
    with pytest.raises(ConfigError, match=rf"\.{field}: .* To go without it, set {field}=(\S+)\.$") as error:
        kind(**{field: given})
    kind(**{field: float(str(error.value).rpartition("=")[2].rstrip("."))})


@pytest.mark.parametrize(("kind", "field"), [(TrainingConfig, "max_grad_norm"), (GenerationConfig, "temperature")])
def test_an_array_for_a_number_is_an_error_of_the_field(kind, field):
    with pytest.raises(ConfigError, match=rf"\.{field}: it must be a number, got array"):
        kind(**{field: np.array([0.0, 0.0])})


def test_a_temperature_of_zero_is_answered_with_the_way_to_take_the_likeliest_token():
    with pytest.raises(ConfigError, match=r"above 0, got 0\. do_sample=False takes the likeliest"):
        GenerationConfig(temperature=0)


def test_dpo_is_not_taken_for_a_misspelt_algorithm():
    with pytest.raises(ConfigError, match="algorithm='dpo' is not offered: it learns from preference pairs"):
        TrainingConfig(algorithm="dpo")
