"""lora_config -> PEFT's config: the targets and options are checked against the layers of the model."""

import copy
import difflib
import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterable
from typing import Any

import peft
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from konic.finetuning.config import LoraConfig
from konic.finetuning.errors import ConfigError, did_you_mean
from konic.output import get_logger

logger = get_logger(__name__)


def peft_config(lora: LoraConfig | peft.LoraConfig, causal_lm: PreTrainedModel) -> peft.LoraConfig:
    """Return the PEFT config for a model.

    The targets are checked against the model's layers, and `fan_in_fan_out` is derived from the layers.

    Raises:
        ConfigError: No target matches a layer, or an option of PEFT is not supported. The message names it.
    """
    if isinstance(lora, LoraConfig):
        values = lora.model_dump()
        if isinstance(values["target_modules"], tuple):
            values["target_modules"] = list(values["target_modules"])
        lora = peft.LoraConfig(**{**values, "fan_in_fan_out": False})
        require_quick_patterns(lora, causal_lm)
    else:
        lora = copy.deepcopy(lora)
        require_quick_patterns(lora, causal_lm)
        lora.inference_mode = False  # True in every saved config
        _require_supported(lora)
        _require_matches(lora, causal_lm)
    layers = {name: module for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    if lora.target_modules is None:
        default = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(causal_lm.config.model_type)
        lora.target_modules = set(default) if isinstance(default, list) else default or "all-linear"
    if lora.target_modules == "all-linear" and not lora.exclude_modules:
        unfit = _in_routers(causal_lm, layers) | _read_by_mamba(causal_lm) | layers_of_shared_weights(causal_lm)
        lora.exclude_modules = unfit or None
    if isinstance(lora.target_modules, str):
        _require_matching_pattern(lora.target_modules, causal_lm, layers)
    elif lora.target_modules or not lora.target_parameters:
        lora.target_modules = _matching_targets(sorted(lora.target_modules), causal_lm, layers)
    targets = lora.target_modules
    lora.fan_in_fan_out = any(
        isinstance(module, Conv1D)
        for name, module in layers.items()
        if isinstance(targets, str) or any(name == target or name.endswith(f".{target}") for target in targets)
    )
    lora.task_type = peft.TaskType.CAUSAL_LM
    return lora


def _in_routers(causal_lm: PreTrainedModel, layers: Iterable[str]) -> set[str]:
    """Return the layers that are routers or stand in one.

    A router returns a tuple, to which PEFT cannot add, or it reads the weights of its layer without calling it.
    """
    routers = [name for name, module in causal_lm.named_modules() if "Router" in type(module).__name__]
    return {name for name in layers if any(f"{name}.".startswith(f"{router}.") for router in routers)}


def _read_by_mamba(causal_lm: PreTrainedModel) -> set[str]:
    """Return the layers whose weights a layer of Mamba reads without calling them, in plain or in fused code."""
    mixers = [name for name, module in causal_lm.named_modules() if hasattr(module, "ssm_state_size")]
    return {f"{mixer}.{name}" for mixer in mixers for name in ("dt_proj", "out_proj")}


def layers_of_shared_weights(causal_lm: PreTrainedModel) -> set[str]:
    """Return the layers whose weights another layer has too, embedding and head aside, as the blocks of Zamba.

    Each would have an adapter of its own, and a merged model is saved and loaded with one weight for all.
    """
    ends = (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    names: dict[int, list[str]] = {}
    for name, module in causal_lm.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and module not in ends:
            names.setdefault(id(module.weight), []).append(name)
    return {name for shared in names.values() if len(shared) > 1 for name in shared}


def require_quick_patterns(lora: peft.LoraConfig, causal_lm: PreTrainedModel) -> None:
    """Try the regular expressions of an adapter on the names of the model's modules, in a process that can be stopped.

    Raises:
        ConfigError: An expression is too long, or it takes more than 5 seconds.
    """
    names = [name for name, _ in causal_lm.named_modules()]
    single = {option: getattr(lora, option, None) for option in ("target_modules", "exclude_modules")}
    patterns = [(option, text, text) for option, text in single.items() if isinstance(text, str)]
    layers = lora.layers_pattern or ()
    for pattern in [layers] if isinstance(layers, str) else layers:
        patterns.append(("layers_pattern", pattern, rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."))
    for option in ("rank_pattern", "alpha_pattern"):
        patterns += [(option, pattern, rf"(.*\.)?({pattern})$") for pattern in getattr(lora, option, None) or ()]
    for option, pattern, _ in patterns:
        if len(pattern) > _LONGEST_PATTERN:
            raise ConfigError(
                f"lora_config: {option}: {_shown(pattern)} has more than {_LONGEST_PATTERN} characters. List names."
            )
    to_try = [part for part in patterns if any(char in "*+?{" for char in part[1]) or part[0] == "layers_pattern"]
    slow = _find_slow([whole for *_, whole in to_try], names) if to_try else None
    if slow is not None:
        option, pattern, _ = to_try[slow]
        raise ConfigError(
            f"lora_config: {option}: the regular expression {_shown(pattern)} takes more than "
            f"{_PATTERN_SECONDS:g} s on the names of the layers, with those before it. Write a list of names instead."
        )


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 100 else pattern[:100] + " …")


def _find_slow(patterns: list[str], names: list[str]) -> int | None:
    """Return which pattern is tried when the time for all of them ends; None if it suffices."""
    try:
        subprocess.run(  # noqa: S603 - this Python, with the line above
            [sys.executable, "-I", "-S", "-c", _TRY_PATTERNS],
            input=json.dumps([patterns, names]), text=True, capture_output=True, timeout=_PATTERN_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        return max(0, len(expired.stdout or b"") - 1)  # it has written a dot for each
    return None


_LONGEST_PATTERN = 10_000
_PATTERN_SECONDS = 5.0
_TRY_PATTERNS = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    print(end=".", flush=True)
    try:
        tried = re.compile(pattern)
    except re.error:
        continue
    for name in names:
        tried.fullmatch(name)
        tried.match(name)
"""


def _require_matching_pattern(pattern: str, causal_lm: PreTrainedModel, layers: dict[str, nn.Module]) -> None:
    """Raise ConfigError if `target_modules` is a text that matches no layer."""
    if pattern.lower() == "all-linear":
        return
    candidates = last_names(layers)
    option = f"LoraConfig.target_modules={pattern!r}"
    try:
        if any(re.fullmatch(pattern, name) for name, _ in causal_lm.named_modules() if name):
            return
    except re.error as error:
        raise ConfigError(
            f"{option} is not a regular expression: {error}. Candidates: {', '.join(candidates)}."
        ) from None
    hint = did_you_mean(pattern, ["all-linear"])
    if not hint:
        nearest = difflib.get_close_matches(pattern, candidates, n=1) or candidates
        hint = f' A text is a regular expression for the whole name of a layer: write a list, such as ["{nearest[0]}"].'
    raise ConfigError(
        f"{option} matches no layer of {type(causal_lm).__name__}.{hint} Candidates: {', '.join(candidates)}."
    )


def _matching_targets(targets: list[str], causal_lm: PreTrainedModel, layers: dict[str, nn.Module]) -> set[str]:
    """Return the targets that match a layer. Others are a warning; if all are, an error."""
    names = [
        name for name, module in causal_lm.named_modules() if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    ]
    candidates = last_names(layers)
    if "all-linear" in targets:
        raise ConfigError("LoraConfig.target_modules: 'all-linear' stands alone. Write target_modules=\"all-linear\".")
    if not targets:
        raise ConfigError(f"LoraConfig.target_modules is empty. Name at least one of: {', '.join(candidates)}.")
    matching = {target for target in targets if any(name == target or name.endswith(f".{target}") for name in names)}
    unmatched = [target for target in targets if target not in matching]
    if unmatched:
        message = (
            f"LoraConfig.target_modules: {', '.join(map(repr, unmatched))} "
            f"{'matches' if len(unmatched) == 1 else 'match'} no layer of {type(causal_lm).__name__}."
            f"{''.join(did_you_mean(target, candidates) for target in unmatched)} Candidates: {', '.join(candidates)}."
        )
        if not matching:
            raise ConfigError(message)
        logger.warning(
            "%s Only %s %s adapted.", message, ", ".join(sorted(matching)), "is" if len(matching) == 1 else "are"
        )
    return matching


def last_names(names: Iterable[str]) -> list[str]:
    """Return the last part of each dotted name, sorted."""
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def _require_matches(lora: peft.LoraConfig, causal_lm: PreTrainedModel) -> None:
    """Raise ConfigError if a name in another option than `target_modules` matches nothing: PEFT would ignore it."""
    kind = type(causal_lm).__name__
    modules = [name for name, _ in causal_lm.named_modules() if name]
    parameters = [name for name, _ in causal_lm.named_parameters(remove_duplicate=False)]
    if isinstance(lora.modules_to_save, str):
        raise ConfigError(f'lora_config: modules_to_save must be a list. Write ["{lora.modules_to_save}"].')
    for name in lora.modules_to_save or ():
        if not any(module.endswith(name) for module in modules):
            raise ConfigError(_no_match("modules_to_save", name, f"module of {kind}", modules))
    for name in lora.target_parameters or ():
        if not any(parameter == name or parameter.endswith(f".{name}") for parameter in parameters):
            raise ConfigError(_no_match("target_parameters", name, f"parameter of {kind}", parameters))
    excluded = [lora.exclude_modules] if isinstance(lora.exclude_modules, str) else lora.exclude_modules
    for name in sorted(excluded or ()):
        pattern = name if isinstance(lora.exclude_modules, str) else rf"(.*\.)?{re.escape(name)}"
        if not _matches_any("exclude_modules", pattern, modules):
            raise ConfigError(_no_match("exclude_modules", name, f"module of {kind}", modules))
    wanted = lora.layers_to_transform
    chosen = {wanted} if isinstance(wanted, int) else set(wanted or ())
    numbers = {int(part) for name in modules for part in name.split(".") if part.isdecimal()}
    if chosen and numbers and not chosen & numbers:
        raise ConfigError(
            f"lora_config: layers_to_transform={wanted} names layers that {kind} does not have. Its layers: 0 to "
            f"{max(numbers)}."
        )
    num_tokens = causal_lm.get_input_embeddings().weight.shape[0]
    tokens = lora.trainable_token_indices or ()
    for token in (index for part in (tokens.values() if isinstance(tokens, dict) else [tokens]) for index in part):
        if not 0 <= token < num_tokens:
            raise ConfigError(
                f"lora_config: trainable_token_indices: index {token} is out of bounds: {kind} has the tokens 0 to "
                f"{num_tokens - 1}."
            )


def require_adapted(lora: peft.LoraConfig, adapted: Collection[str]) -> None:
    """Raise ConfigError if an option for some of the adapted layers names none of them: PEFT would ignore it.

    Args:
        lora: The config of the adapter.
        adapted: Names of the layers that PEFT has adapted with it.
    """
    for option in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(lora, option) or ():
            if not _matches_any(option, rf"(.*\.)?({pattern})", adapted):
                raise ConfigError(_no_match(option, pattern, "adapted layer", adapted))
    numbers = [[int(part) for part in name.split(".") if part.isdecimal()] for name in adapted]
    indices = {number for found in numbers for number in (found if lora.layers_pattern else found[:1])}
    wanted = lora.layers_to_transform
    missing = sorted(({wanted} if isinstance(wanted, int) else set(wanted or ())) - indices)
    if missing:
        raise ConfigError(
            f"lora_config: layers_to_transform: layer {missing[0]} has none of the target_modules. "
            f"Adapted layers: {', '.join(map(str, sorted(indices)))}."
        )


def _matches_any(option: str, pattern: str, names: Iterable[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise ConfigError(f"lora_config: {option}: {pattern!r} is not a regular expression: {error}.") from None


def _no_match(option: str, name: str, what: str, known: Iterable[str]) -> str:
    num_parts = name.count(".") + 1
    endings = {".".join(full.split(".")[-num_parts:]) for full in known}
    return (
        f"lora_config: {option}: {name!r} matches no {what}.{did_you_mean(name, endings)} Correct it or leave it out."
    )


_UNSUPPORTED = (
    "alora_invocation_tokens", "arrow_config", "ensure_weight_tying", "kasa_config", "layer_replication",
    "megatron_config", "monteclora_config",
)  # fmt: skip
"""Options of PEFT whose adapters act on some tokens only, draw random numbers, or change the base model for good."""
_BASE_STAYS = (True, "gaussian", "orthogonal", "mica")
_BASE_CHANGES = ("pissa", "olora", "loftq")
"""Values of `init_lora_weights` that leave the weights of the base model alone, and that rewrite them the same way each
time. Others compute their start from data or random numbers that are not in the saved adapter."""


def unsupported_option(lora: peft.LoraConfig) -> str | None:
    """Return what is wrong with an adapter that cannot be switched off, merged or loaded again without a difference."""
    zero = _zero_alpha(lora)
    if zero is not None:
        return f"{zero} multiplies what it names by 0, so training would change nothing there."
    name = next((name for name in _UNSUPPORTED if getattr(lora, name, None)), None)
    return name and (
        f"{name} is not supported. The adapter must act on every token in the same way, and it must be possible to "
        "switch it off and to merge it."
    )


def _zero_alpha(lora: peft.LoraConfig) -> str | None:
    """Return the setting that multiplies the adapter, or a part of it, by 0."""
    if lora.lora_alpha == 0:
        return "lora_alpha=0"
    given = getattr(lora, "alpha_pattern", None)
    pattern = given if isinstance(given, dict) else {}
    return next((f"alpha_pattern={{{name!r}: 0}}" for name, alpha in pattern.items() if alpha == 0), None)


def _require_supported(lora: peft.LoraConfig) -> None:
    problem = unsupported_option(lora)
    if problem is not None:
        advice = "Use a positive number, such as 16." if _zero_alpha(lora) else "Leave that option out."
        raise ConfigError(f"lora_config: {problem} {advice}")
    if lora.task_type not in (None, peft.TaskType.CAUSAL_LM):
        name = getattr(lora.task_type, "value", lora.task_type)
        raise ConfigError(
            f"lora_config: task_type={name!r} is for another kind of model. konic trains models that "
            "generate text: use 'CAUSAL_LM', or leave it out."
        )
    if getattr(lora, "velora_config", None) is not None:
        raise ConfigError("lora_config: velora_config has no effect: konic never uses train mode. Leave it out.")
    if lora.init_lora_weights not in (*_BASE_STAYS, *_BASE_CHANGES):
        raise ConfigError(
            f"lora_config: init_lora_weights={lora.init_lora_weights!r} starts from data or random numbers that the "
            f"saved adapter does not hold. Use one of {', '.join(map(repr, (*_BASE_STAYS, *_BASE_CHANGES)))}."
        )


def incomplete_start(lora: peft.LoraConfig) -> str | None:
    """Return what is wrong with a saved adapter whose start changed the base model in a way that it does not hold.

    Other starts do not matter: the saved weights take their place.
    """
    name = lora.init_lora_weights
    if name in (*_BASE_STAYS, *_BASE_CHANGES, False, "eva"):
        return None
    return f"its init_lora_weights={name!r} changes the base model by data or random numbers that it does not hold."


OWN_SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules")
"""What is recorded of the settings of a saved adapter."""


def own_settings(adapter: peft.LoraConfig) -> dict[str, Any]:
    """Return the settings of a saved adapter that a user may want to know, as plain values without paths."""
    values = {name: getattr(adapter, name) for name in OWN_SETTINGS}
    return {name: sorted(value) if isinstance(value, set | list | tuple) else value for name, value in values.items()}


def adapter_off_is_base(adapter: peft.LoraConfig) -> bool:
    """Return False if the adapter trains or rewrites weights of the base model itself, else True."""
    return adapter.bias == "none" and adapter.init_lora_weights in _BASE_STAYS
