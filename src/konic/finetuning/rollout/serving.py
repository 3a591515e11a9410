"""Settings + policy -> a sampler on a vLLM server, started if the settings name none, and ended with the run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from konic.finetuning.config import GenerationConfig
from konic.finetuning.errors import ConfigError, OutputError, SamplerError
from konic.finetuning.models.policy import Policy
from konic.finetuning.rollout.sampler import SpecialTokens
from konic.finetuning.rollout.vllm_client import VllmClient
from konic.finetuning.rollout.vllm_sampler import VllmSampler
from konic.finetuning.rollout.vllm_server import BASE_NAME, require_vllm, started_server
from konic.finetuning.rollout.vllm_weights import (
    ServedWeights,
    reason_to_merge,
    save_untied,
    served_models,
    served_rank,
)
from konic.finetuning.system.files import as_path


def check_server(generation: GenerationConfig) -> None:
    """Check what can be checked before the model is loaded: the Python with vLLM, or that the server answers.

    Raises:
        ConfigError: There is no such Python, the address is none, or the server takes too short texts.
        SamplerError: The server does not answer.
    """
    if generation.vllm_python is not None:
        require_vllm(generation.vllm_python)
    elif generation.vllm_address is not None:
        _served_base(VllmClient(generation.vllm_address, generation.vllm_timeout_seconds), generation)


def _served_base(client: VllmClient, generation: GenerationConfig) -> str:
    """Return the name of the model that a server serves, without adapters."""
    base = next((entry for entry in served_models(client) if not entry.get("parent")), None)
    if base is None:
        raise SamplerError(f"{client.name} lists adapters at /v1/models, and no model.")
    longest, needed = base.get("max_model_len"), generation.max_prompt_length + generation.max_new_tokens
    if isinstance(longest, int) and longest < needed:
        raise ConfigError(
            f"{client.name} takes {longest} tokens, and max_prompt_length={generation.max_prompt_length} + "
            f"max_new_tokens={generation.max_new_tokens} may need {needed}. Start it with --max-model-len={needed}."
        )
    return str(base["id"])


@contextmanager
def serving(
    generation: GenerationConfig, policy: Policy, special: SpecialTokens, location: str, revision: str | None
) -> Iterator[VllmSampler]:
    """Yield a sampler on the server that the settings name, or on one that is started, and ended on exit.

    Args:
        generation: The settings; engine is "vllm".
        policy: The policy that is trained.
        special: The tokens that end a response, and the one that fills padding.
        location: The Hub id or folder of the base model.
        revision: Of the base model on the Hub; None for the main branch.
    """
    with _weights_folder(generation) as folder, _client(generation, policy, location, revision) as (client, base):
        weights = ServedWeights(client, policy, folder, base)
        try:
            yield VllmSampler(policy, special, client, weights)
        finally:
            weights.close()


@contextmanager
def _client(
    generation: GenerationConfig, policy: Policy, location: str, revision: str | None
) -> Iterator[tuple[VllmClient, str]]:
    if generation.vllm_address is not None:
        client = VllmClient(generation.vllm_address, generation.vllm_timeout_seconds)
        yield client, _served_base(client, generation)
        return
    dtype = str(policy.language_model.causal_lm.dtype).removeprefix("torch.")
    longest = generation.max_prompt_length + generation.max_new_tokens
    sizes = ["--dtype", dtype, "--max-model-len", str(longest)]
    if reason_to_merge(policy) is not None:
        with TemporaryDirectory(prefix="konic-start-", ignore_cleanup_errors=True) as start:
            save_untied(policy, Path(start))  # what is reloaded has to have the same weights by name
            with started_server(generation, ["--model", start, *sizes], reloads=True) as client:
                yield client, BASE_NAME
        return
    sizes += ["--revision", revision] if revision is not None and not Path(location).is_dir() else []
    sizes += ["--enable-lora", "--max-loras", "1", "--max-cpu-loras", "2"]
    sizes += ["--max-lora-rank", str(served_rank(policy.adapter_config().r))]
    with started_server(generation, ["--model", location, *sizes], reloads=False) as client:
        yield client, BASE_NAME


@contextmanager
def _weights_folder(generation: GenerationConfig) -> Iterator[Path]:
    """Yield the folder to which weights are written."""
    if generation.vllm_folder is None:
        with TemporaryDirectory(prefix="konic-weights-", ignore_cleanup_errors=True) as folder:
            yield Path(folder)
        return
    yield as_path(generation.vllm_folder, "GenerationConfig(vllm_folder)", OutputError)
