"""A run and the name of weights in it -> the saved model: its base, its adapter, and what trained it."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from konic.finetuning.errors import ModelError, OutputError
from konic.finetuning.models.adapters import attach_adapter
from konic.finetuning.models.containment import find_outside, require_bounded_tokenizer
from konic.finetuning.models.loading import load_model
from konic.finetuning.models.locations import PACKAGED_MODELS, quiet_transformers
from konic.finetuning.models.merging import merge_into_base
from konic.finetuning.models.quantised import dequantised, recorded_quantisation
from konic.finetuning.results.iteration import FinetuningIterationResult
from konic.finetuning.results.summary import FinetuningResult, Selection
from konic.finetuning.system.places import find_stray, looks_like_path, read_json
from konic.report.run import Run
from konic.text import describe_error

ADAPTER_CONFIG = "adapter_config.json"
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class SavedModel:
    """Weights that a run saved. Nothing is loaded before it is asked for, and no script or remote code of the run."""

    run: Run
    name: str
    """The folder in the run: final, best, checkpoint-20."""

    @classmethod
    def find(cls, run_folder: Path, weights: str | None) -> "SavedModel":
        """Return the weights of a run that are asked for, checked for files that lie elsewhere.

        Raises:
            OutputError: It is no run, or has no such weights.
            ModelError: Files of the model are missing, unreadable or elsewhere.
        """
        run = Run.read(run_folder)
        saved = cls(run, run.find_weights(weights))
        outside = find_outside(saved.folder)
        weights_file = saved.folder / "adapter_model.safetensors"
        if outside is None and saved.is_adapter and weights_file.exists():  # it is copied, not only read
            outside = find_stray([weights_file], saved.folder)
        if outside is not None:
            raise ModelError(f"{saved.folder}: {outside}.")
        if not saved.is_adapter and not (saved.folder / "config.json").is_file():
            raise ModelError(f"{saved.folder}: holds neither an adapter_config.json nor a config.json: no model.")
        if saved.is_adapter and (not weights_file.is_file() or not saved.base):
            raise ModelError(f"{saved.folder}: its adapter has no adapter_model.safetensors, or names no base model.")
        if saved.is_adapter and saved.adapter_config.get("peft_type") != "LORA":
            kind = str(saved.adapter_config.get("peft_type"))
            raise ModelError(f"{saved.folder}: holds a {kind} adapter, and only LoRA adapters are exported.")
        return saved

    @property
    def folder(self) -> Path:
        """The folder of the weights."""
        return self.run.path / self.name

    @property
    def is_adapter(self) -> bool:
        """True for an adapter, False for a full model."""
        return (self.folder / ADAPTER_CONFIG).is_file()

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        """PEFT's config of the adapter."""
        try:
            config = read_json(self.folder / ADAPTER_CONFIG)
        except (OSError, ValueError) as error:
            raise ModelError(f"{self.folder / ADAPTER_CONFIG}: cannot be read: {describe_error(error)}.") from None
        return config if isinstance(config, dict) else {}

    @property
    def base(self) -> str:
        """What the adapter's base model is loaded by: a packaged name, a Hub id or a folder."""
        named, trained = str(self.adapter_config.get("base_model_name_or_path") or ""), self.settings.get("model_name")
        packaged = PACKAGED_MODELS.get(str(trained))
        if packaged is not None and Path(named).name.startswith(Path(packaged.file).stem):
            return str(trained)  # the folder in the cache of the machine that trained may be elsewhere here
        return named

    @property
    def base_is_on_the_hub(self) -> bool:
        """True if others find the base model by its name."""
        return is_hub_id(self.base)

    @property
    def title(self) -> str:
        """What to call the model: its base and its run, without the paths of this machine."""
        return f"{Path(str(self.settings.get('model_name'))).name} {self.run.name}"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run."""
        return self.run.settings

    def setting(self, name: str) -> dict[str, Any]:
        """A config among the settings, such as generation_config."""
        value = self.settings.get(name)
        return value if isinstance(value, dict) else {}

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return the full model in float32, with the adapter merged in, and the tokenizer.

        Raises:
            ModelError: The model or its base cannot be loaded.
        """
        if not self.is_adapter:
            loaded = load_model(str(self.folder), {}, _CPU)
            return loaded.model, loaded.tokenizer
        loaded = load_model(self.base, self._base_kwargs(), _CPU)
        if loaded.adapter is not None:
            raise ModelError(f"{self.folder}: its base model {self.base!r} is an adapter too. Merge that one first.")
        model = merge_into_base(attach_adapter(dequantised(loaded.model), self.folder))
        return model, self.load_tokenizer() or loaded.tokenizer

    def _base_kwargs(self) -> dict[str, Any]:
        """Return how the base model is loaded: at the adapter's revision, and quantised if it was in training."""
        revision = self.adapter_config.get("revision")
        at = {"revision": revision} if isinstance(revision, str) else {}
        return at | recorded_quantisation(self.setting("model_kwargs"))

    def load_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Return the tokenizer that was saved with the weights; None if there is none."""
        if not (self.folder / "tokenizer_config.json").is_file():
            return None
        try:
            with quiet_transformers():
                require_bounded_tokenizer(str(self.folder), str(self.folder), {})
                tokenizer = AutoTokenizer.from_pretrained(str(self.folder), trust_remote_code=False)
                tokenizer("", verbose=False)  # some faults are noticed only in use
                return tokenizer
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(f"{self.folder}: its tokenizer cannot be loaded: {describe_error(error)}.") from None

    def result(self) -> FinetuningResult:
        """Return the result of the run up to these weights; without history if the metrics are not of this version."""
        try:
            history = [FinetuningIterationResult.from_dict(row) for row in self.run.history]
            selection = Selection(**self.setting("selection"))
        except (TypeError, ValueError, KeyError, AttributeError):
            history, selection = [], Selection()
        name = str(self.settings.get("model_name"))
        whole = FinetuningResult(name, history, math.nan, None, selection=selection)
        if not history:
            return whole
        last = whole.best_iteration if self.name == "best" else whole.total_iterations
        until = self.run.iterations_of(self.name) or last
        before, after = self.run.evaluations.get(0), self.run.evaluations.get(until) if self.name != "best" else None
        return FinetuningResult(name, history[:until], math.nan, None, selection=selection, before=before, after=after)


def is_hub_id(name: str) -> bool:
    """Return True for the name of a model that is neither packaged nor in a folder."""
    return name not in PACKAGED_MODELS and not looks_like_path(name) and not Path(name).exists()


def read_dtype(asked: str | None, saved: SavedModel) -> torch.dtype:
    """Return the dtype asked for; None stands for the run's own.

    Raises:
        OutputError: There is no such dtype for safetensors.
    """
    name = asked or str(saved.setting("model_kwargs").get("dtype") or "float32").removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise OutputError(f"--dtype {name}: safetensors are written as float32, float16 or bfloat16.")
    return getattr(torch, name)
