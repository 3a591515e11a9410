"""Agent -> ConfigError, or nothing: settings that are right by themselves and cannot go together in a run."""

from konic.finetuning.agent import KonicFinetuningAgent
from konic.finetuning.config import TrainingConfig
from konic.finetuning.errors import ConfigError
from konic.finetuning.models.loading import pick_device
from konic.finetuning.models.model_kwargs import parts_of
from konic.finetuning.rewards.composer import find_override
from konic.finetuning.rewards.reducers import WeightedSumReducer, reducer_of
from konic.finetuning.rollout.serving import check_server
from konic.output import get_logger

logger = get_logger(__name__)


def check_settings(agent: KonicFinetuningAgent, num_processes: int, device: str) -> None:
    """Check what can be checked before prompts and model are loaded.

    Args:
        agent: What the run is made of.
        num_processes: Processes of the run.
        device: As the user named it, such as "auto".

    Raises:
        ConfigError: The run cannot start.
    """
    training, generation = agent.get_training_config(), agent.get_generation_config()
    if num_processes > training.batch_size:
        raise ConfigError(
            f"TrainingConfig: batch_size={training.batch_size} is fewer responses than the {num_processes} processes "
            "of this run. Raise it, or start fewer processes."
        )
    attention = parts_of(agent.get_model_kwargs().get("attn_implementation"))
    if "flex_attention" in attention and pick_device(device).type == "cpu":
        raise ConfigError(
            "model_kwargs: attn_implementation='flex_attention' cannot train on a CPU. Use 'sdpa' or 'eager', or leave "
            "it out."
        )
    if training.sharding is not None:
        _check_sharding(agent, num_processes, device)
    if generation.engine == "vllm":
        if num_processes > 1:
            raise ConfigError("GenerationConfig: engine='vllm' runs in one process so far. Start no more of them.")
        check_server(generation)
    if training.kl_target is not None and agent.kl_penalty_weight == 0:
        raise ConfigError("kl_target steers kl_penalty_weight by factors: start it above 0, such as 0.05.")
    if training.algorithm_row.looks_at_parts:
        _check_parts(agent)
    _warn_of_settings_without_effect(training)
    dataset = agent.get_dataset_config()
    if dataset.prefer_undecided and not (dataset.held_out and training.eval_every):
        logger.warning(
            "prefer_undecided asks other prompts as the policy learns, so the rewards of two batches cannot be "
            "compared, and best/ may be too early. Set held_out in DatasetConfig and eval_every in TrainingConfig to "
            "choose it by the same prompts."
        )
    if generation.distribution_filters:
        logger.warning(
            "Sampling with %s draws from another distribution than the one trained: the ratio and the KL shown "
            "describe the unfiltered policy.",
            ", ".join(generation.distribution_filters),
        )


def _warn_of_settings_without_effect(training: TrainingConfig) -> None:
    """Warn of settings that nothing reads, because the one that turns them on is off."""
    learns_values = f"algorithm={training.algorithm!r} learns no values", training.algorithm_row.learns_values
    off = {
        "divergence": ("divergence_limit is not set", training.divergence_limit is not None),
        "kl_horizon": ("kl_target is not set", training.kl_target is not None),
        "overlong_share": ("overlong_penalty is 0", training.overlong_penalty > 0),
        "resampling_budget": ("filter_equal_groups is not set", training.filter_equal_groups),
        "max_error_rate": ("on_reward_error is not 'skip'", training.on_reward_error == "skip"),
        "gamma": (
            f"algorithm={training.algorithm!r} gives every token the reward of its whole response",
            training.algorithm_row.discounts,
        ),
        **dict.fromkeys(("vf_coef", "gae_lambda", "gae_lambda_length", "value_gae_lambda"), learns_values),
    }
    for name, (why, has_effect) in off.items():
        value = getattr(training, name)
        if not has_effect and value != type(training).model_fields[name].default:
            logger.warning("TrainingConfig: %s=%r has no effect, because %s.", name, value, why)


def _check_sharding(agent: KonicFinetuningAgent, num_processes: int, device: str) -> None:
    """Raise ConfigError if the weights cannot be divided among these processes, on this device."""
    start = f"TrainingConfig: sharding={agent.get_training_config().sharding!r}"
    if num_processes == 1:
        raise ConfigError(
            f"{start} divides the weights among the processes of a run, and this is one alone. Start several, such as "
            "torchrun --nproc-per-node 2 SCRIPT, or leave sharding out."
        )
    if pick_device(device).type not in ("cpu", "cuda"):
        raise ConfigError(f"{start} works with device='cpu' or 'cuda', not {device!r}.")


def _check_parts(agent: KonicFinetuningAgent) -> None:
    """Raise ConfigError unless the parts of the reward are just weighted and summed: the algorithm does that itself."""
    start = (
        f"algorithm={agent.get_training_config().algorithm!r} weights and sums the parts of the reward itself: it "
        "cannot use"
    )
    composer = agent.get_reward_composer()
    reducer = reducer_of(composer.reducer)
    kind = reducer if isinstance(reducer, type) else type(reducer)
    is_plain_sum = kind is WeightedSumReducer and (reducer is kind or vars(reducer) == vars(WeightedSumReducer()))
    if not is_plain_sum:
        raise ConfigError(
            f"{start} the reducer {kind.__name__}. Use WeightedSumReducer without arguments, or algorithm='grpo'."
        )
    override = find_override(composer)
    if override is not None:
        raise ConfigError(f"{start} {override.name}. Use algorithm='grpo'.")
