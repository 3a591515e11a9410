"""Policy -> the weights that a vLLM server samples with: written to a folder, and loaded by the server."""

import json
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from konic.finetuning.errors import SamplerError
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.policy_files import save_adapter, save_merged
from konic.finetuning.rollout.vllm_client import RequestRefusedError, VllmClient
from konic.finetuning.system.files import replacing_folder

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM 0.32 takes as --max-lora-rank."""
_PLAIN_STARTS = (True, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` of adapters that leave the base model as it is."""


def reason_to_merge(policy: Policy) -> str | None:
    """Return why vLLM cannot serve the policy's adapter, so that merged weights are loaded; None if it can."""
    if not policy.uses_lora:
        return "every weight is trained"
    config = policy.adapter_config()
    options = {
        "use_dora": config.use_dora,
        "modules_to_save": config.modules_to_save,
        "lora_bias": config.lora_bias,
        "bias": config.bias != "none",
        "rank_pattern": config.rank_pattern,  # vLLM scales all layers by lora_alpha / r
        "alpha_pattern": config.alpha_pattern,
        "trainable_token_indices": config.trainable_token_indices,
        "target_parameters": config.target_parameters,
        "init_lora_weights": config.init_lora_weights not in _PLAIN_STARTS,
    }
    named = [name for name, is_used in options.items() if is_used]
    if named:
        return f"vLLM serves no adapter with {named[0]}={getattr(config, named[0])!r}"
    if config.r > LORA_RANKS[-1]:
        return f"vLLM serves no adapter of a rank above {LORA_RANKS[-1]}"
    return None


def save_untied(policy: Policy, folder: Path) -> None:
    """Write the merged model; a head that shares the weights of the embedding is written as weights of its own.

    On a CPU, vLLM 0.32 packs the head when it starts, and where the head is tied it packs it never again: after the
    weights were reloaded, it sampled with the new embedding and the old head.
    """
    save_merged(policy, folder)
    model = policy.language_model.causal_lm
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    head, embedding = (
        names.get(id(module)) for module in (model.get_output_embeddings(), model.get_input_embeddings())
    )
    files = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _tensor_names(file)}
    if head is None or head in files or embedding not in files:
        return
    with safe_open(files[embedding], framework="pt") as stored:
        save_file({head: stored.get_tensor(embedding)}, folder / "head.safetensors", metadata={"format": "pt"})
    if (whole := folder / "model.safetensors").exists():  # a folder of several files has an index
        whole.rename(folder / "body.safetensors")
        files = dict.fromkeys(files, folder / "body.safetensors")
    parts = {name: file.name for name, file in files.items()} | {head: "head.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": parts}))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}), encoding="utf-8")


def _tensor_names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as stored:
        return list(stored.keys())


class ServedWeights:
    """The policy's weights on a server: an adapter under a new name each time, or the merged model.

    Args:
        client: Talks to the server.
        policy: Its weights are written.
        folder: Where they are written, under a path that the server can read too.
        base_name: The name under which the server serves the base model.
    """

    def __init__(self, client: VllmClient, policy: Policy, folder: Path, base_name: str) -> None:
        self._client, self._policy, self._folder = client, policy, folder
        self._base_name, self._run = base_name, secrets.token_hex(4)
        self._merges_because = reason_to_merge(policy)
        self._loaded: str | None = None

    def load(self, iteration: int) -> str:
        """Write the weights of an iteration and let the server load them; return the name to sample under.

        Raises:
            SamplerError: The server does not load them.
            OutputError: They cannot be written.
        """
        name = f"konic-{self._run}-{iteration}"
        path, merges = self._folder / name, self._merges_because is not None
        try:
            with replacing_folder(path) as target:
                (save_untied if merges else save_adapter)(self._policy, target)
            (self._load_merged if merges else self._load_adapter)(name, path)
        except BaseException as error:
            with suppress(SamplerError):  # a late server may have it nevertheless
                self._unload(name if isinstance(error, SamplerError) else None)
            shutil.rmtree(path, ignore_errors=True)
            raise
        previous, self._loaded = self._loaded, name
        with suppress(RequestRefusedError):  # a server that was started again does not know it
            self._unload(previous)
        return self._base_name if merges else name

    def _load_adapter(self, name: str, path: Path) -> None:
        try:
            self._client.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        except RequestRefusedError as error:
            raise SamplerError(
                f"{error}",
                "It has to be started with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, --enable-lora and --max-lora-rank="
                f"{served_rank(self._policy.adapter_config().r)}, and it must be able to read {path}.",
            ) from None
        served = {entry.get("id"): entry for entry in served_models(self._client)}
        if str(served.get(name, {}).get("root")) != str(path):
            raise SamplerError(f"{self._client.name} said that it loaded {path}, but does not list it as {name}.")

    def _load_merged(self, name: str, path: Path) -> None:
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        try:
            self._client.post("/collective_rpc", body)
            answer = self._client.post("/reset_prefix_cache", {})
        except RequestRefusedError as error:
            raise SamplerError(
                f"{error}",
                f"konic let it load the whole model, because {self._merges_because}. For that it has to be started "
                f"with VLLM_SERVER_DEV_MODE=1, and must be able to read {path}. Or train a plain LoRA adapter.",
            ) from None
        if not isinstance(answer, Mapping) or answer.get("success") is not True:
            raise SamplerError(f"{self._client.name} did not forget what it had computed with older weights.")

    def _unload(self, name: str | None) -> None:
        if name is not None:
            try:
                if self._merges_because is None:
                    self._client.post("/v1/unload_lora_adapter", {"lora_name": name})
            finally:
                shutil.rmtree(self._folder / name, ignore_errors=True)

    def close(self) -> None:
        """Let the server unload the last adapter, and remove its files."""
        name, self._loaded = self._loaded, None
        with suppress(SamplerError):  # the server may have ended
            self._unload(name)


def served_models(client: VllmClient) -> list[dict[str, Any]]:
    """Return what the server lists: base models and adapters, by "id".

    Raises:
        SamplerError: It lists nothing: it is no server of vLLM.
    """
    answer = client.get("/v1/models")
    entries = answer.get("data") if isinstance(answer, dict) else None
    found = [entry for entry in entries or () if isinstance(entry, dict) and isinstance(entry.get("id"), str)]
    if not found:
        raise SamplerError(f"{client.name} lists no models at /v1/models: it is no server of vLLM. Check vllm_address.")
    return found


def served_rank(rank: int) -> int:
    """Return the smallest --max-lora-rank that fits a rank."""
    return next(size for size in LORA_RANKS if size >= rank)
