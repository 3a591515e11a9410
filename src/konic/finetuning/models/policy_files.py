"""Policy -> folder, and back: its adapter or full model as PEFT and `transformers` write them, and its value head.

Where weights are divided among processes, all of them make the same call. None for the folder is for a process that
only gives its part of the weights to the first one.
"""

import copy
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from konic.finetuning.errors import ConfigError
from konic.finetuning.models.adapters import attach_adapter
from konic.finetuning.models.containment import find_outside
from konic.finetuning.models.locations import quiet_transformers
from konic.finetuning.models.merging import merge_into_base, merged_model
from konic.finetuning.models.policy import Policy
from konic.finetuning.models.sharding import NOT_SHARDED, divided_like, gathered, own_part


def save_policy(policy: Policy, folder: Path | None) -> None:
    """Write the adapter (or the full model), the tokenizer and the value head to a folder, as safetensors."""
    save_model(policy, folder)
    if folder is not None:
        policy.value_head.save(folder)


def save_model(policy: Policy, folder: Path | None) -> None:
    """Write the adapter (or the full model) and the tokenizer to a folder, as PEFT and `transformers` do."""
    if policy.adapted is None:
        _save_full(policy, policy.language_model.causal_lm, folder)
    elif folder is not None:
        save_adapter(policy, folder)
        with quiet_transformers():
            policy.tokenizer.save_pretrained(folder)


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write the adapter alone to a folder, as PEFT does; the policy has one."""
    assert policy.adapted is not None  # noqa: S101
    with quiet_transformers():
        policy.adapted.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])


def save_merged(policy: Policy, folder: Path | None) -> None:
    """Write the full model, with the adapter merged in, and the tokenizer to a folder.

    Raises:
        ConfigError: The frozen weights are divided: they are merged where they are whole.
    """
    if policy.adapted is None:
        _save_full(policy, policy.language_model.causal_lm, folder)
    elif policy.sharding is not NOT_SHARDED:
        raise ConfigError(
            "save_pretrained(merge=True): with sharding, no process holds the whole model. Save the adapter "
            "without merge, or merge it afterwards: konic export RUN --format merged"
        )
    elif folder is not None and policy.load_original is not None:
        with TemporaryDirectory() as adapter:
            save_model(policy, Path(adapter))
            original = attach_adapter(policy.load_original(), Path(adapter))
            _save_full(policy, merge_into_base(original), folder)
    elif folder is not None:
        _save_full(policy, merged_model(policy.adapted), folder)


def load_policy(policy: Policy, folder: Path) -> None:
    """Load the weights that :func:`save_policy` wrote.

    Raises:
        ValueError: The adapter in the folder has different layers or a different rank, or the folder holds another kind
            of weights.
    """
    if policy.adapted is not None:
        weights = load_file(folder / "adapter_model.safetensors")
        own = peft.get_peft_model_state_dict(policy.adapted, save_embedding_layers=False)
        if {name: t.shape for name, t in weights.items()} != {name: t.shape for name, t in own.items()}:
            raise ValueError("its adapter has different layers or a different rank than this run's adapter")
        peft.set_peft_model_state_dict(policy.adapted, weights)
    else:
        _load_full(policy, folder)
    policy.value_head.load(folder)


def _save_full(policy: Policy, model: PreTrainedModel, folder: Path | None) -> None:
    state = gathered(model.state_dict(), keep=folder is not None) if policy.sharding.divides_trained else None
    if folder is not None:
        with quiet_transformers():
            model.save_pretrained(folder, state_dict=state)
            policy.tokenizer.save_pretrained(folder)


def _load_full(policy: Policy, folder: Path) -> None:
    if (folder / "adapter_config.json").exists():
        raise ValueError("it holds an adapter, and this run trains every weight")
    outside = find_outside(folder)
    if outside is not None:
        raise ValueError(outside)
    causal_lm = policy.language_model.causal_lm
    with quiet_transformers():
        source = policy.kind.from_pretrained(
            folder, config=copy.deepcopy(causal_lm.config), dtype=causal_lm.dtype, use_safetensors=True,
            trust_remote_code=False,
        )  # fmt: skip
    whole = source.state_dict()
    with torch.no_grad():
        for name, weight in causal_lm.state_dict().items():
            own_part(weight).copy_(own_part(divided_like(weight, whole[name])))
