"""A name that konic 0.1 had and that is not here -> an error that says what to use instead."""

from konic.finetuning.errors import NotOfferedError

_ENGINE = "The engine does this itself: KonicFinetuningEngine.from_agent(agent).train()."
_MODEL = "The engine loads and wraps the model: name it with base_model, and its adapter with lora_config."
_ALGORITHM = "TrainingConfig(algorithm=...) chooses how the one engine learns."
_DATA = "DatasetConfig says where prompts come from, and the engine loads them."

SUCCESSORS = {
    "ADVANTAGE_STD_THRESHOLD": _ENGINE,
    "BackendConfig": _ALGORITHM,
    "BaseKonicLLMEnvironment": _ENGINE,
    "BaseKonicLLMModule": _MODEL,
    "BaseTrainingBackend": _ALGORITHM,
    "DataDependency": _DATA,
    "DatasetLoader": f"{_DATA} Rows that you change in Python are given as DatasetConfig(prompts=[...]).",
    "ForwardAllOutput": _ENGINE,
    "KonicLLMEnvironment": _ENGINE,
    "KonicTorchRLHF": _MODEL,
    "LLMRewardKeys": "composer.reward_names lists the methods marked with @llm_reward.",
    "NativeRLHFBackend": _ALGORITHM,
    "PPOUpdater": _ENGINE,
    "PreferenceDatasetConfig": "`konic reward-model train` makes a reward model of preference pairs.",
    "PromptDatasetConfig": "DatasetConfig has system_prompt and prompt_template.",
    "PromptTemplate": 'DatasetConfig(prompt_template="Review: {text}") makes a prompt of columns.',
    "TokenizerWrapper": _MODEL,
    "ValueHead": _MODEL,
    "apply_lora": _MODEL,
    "clear_registered_data": _DATA,
    "compute_gae_advantages": _ENGINE,
    "count_trainable_parameters": _MODEL,
    "get_llm_reward_fns": "composer.reward_names lists the methods marked with @llm_reward.",
    "get_lora_state_dict": "engine.save_pretrained(path) writes the adapter, for PEFT.",
    "get_registered_data": _DATA,
    "get_target_modules_for_model": "LoraConfig(target_modules=None) takes what PEFT has for the model.",
    "register_backend": _ALGORITHM,
    "register_data": "Name a file: DatasetConfig(source=DatasetSource.LOCAL, name=path).",
}
MODULES = {
    "konic.finetuning.backends": f"{_ALGORITHM} FinetuningResult is in konic.finetuning.",
    "konic.finetuning.environment": _ENGINE,
    "konic.finetuning.module": _MODEL,
}


def name_not_found(module: str, name: str) -> Exception:
    """Return the error for a name that a module does not have."""
    if name in SUCCESSORS:
        return NotOfferedError(f"konic 0.1 had {name} in {module}; it is not offered here. {SUCCESSORS[name]}")
    return AttributeError(f"module {module!r} has no attribute {name!r}")


def module_not_offered(module: str) -> NotOfferedError:
    """Return the error for a module that konic 0.1 had."""
    return NotOfferedError(f"konic 0.1 had the module {module}; it is not offered here. {MODULES[module]}")
