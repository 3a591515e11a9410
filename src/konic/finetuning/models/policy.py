"""LoadedModel + LoraConfig -> Policy: base model, adapter, value head and reference policy.

With a new LoRA adapter, the reference policy is the same weights with the adapter switched off.
:meth:`Policy.reference` lists the other cases.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from konic.finetuning.config import LoraConfig
from konic.finetuning.errors import ConfigError, TrainingError, safe_cause
from konic.finetuning.models.adapter_config import adapter_off_is_base, peft_config
from konic.finetuning.models.adapters import (
    REFERENCE_ADAPTER,
    attach_adapter,
    can_merge,
    load_adapter,
    merge_into_base,
    merged_layer,
    merged_model,
    moved_weights,
    new_adapter,
    switch_off_dropout,
)
from konic.finetuning.models.containment import find_outside
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.loading import LoadedModel
from konic.finetuning.models.locations import quiet_transformers
from konic.finetuning.models.positions import position_ids
from konic.finetuning.models.prepacked import DecodePlan
from konic.finetuning.models.products import fast_products
from konic.finetuning.models.sharding import NOT_SHARDED, Sharding, divided_like, gathered, own_part
from konic.finetuning.models.value_head import ValueHead
from konic.finetuning.system.memory import eager_free
from konic.finetuning.system.signals import uninterrupted
from konic.finetuning.system.world import World
from konic.output import get_logger
from konic.text import describe_error

logger = get_logger(__name__)

MAX_REFERENCE_DIFFERENCE = 1e-4
"""Largest difference between the logits of the reference and those of the loaded model."""
MAX_MERGED_DIFFERENCE = 0.2
"""Largest difference of the logits of the merged and the unmerged adapter, relative to what the adapter changes."""
ROUNDING_IN_16_BITS = 0.1
"""What rounding may add to that difference in 16 bits, relative to the logits; it adds some hundredths."""


class Policy:
    """The model that is trained, with its reference policy and a value head on its last hidden state."""

    def __init__(
        self,
        loaded: LoadedModel,
        lora: LoraConfig | peft.LoraConfig | None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        load_original: Callable[[], PreTrainedModel] | None = None,
    ) -> None:
        """Build a policy. `load_original` loads the base model for merging, if `loaded` holds it rounded."""
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        causal_lm = loaded.model
        self.language_model = LanguageModel(causal_lm)
        self.sharding: Sharding = NOT_SHARDED
        self._kind = type(causal_lm)
        switch_off_dropout(causal_lm)
        self._gradient_checkpointing = gradient_checkpointing
        self._probe = self.language_model.probe_ids(8)[None]
        causal_lm.eval()
        self._adapted: peft.PeftModel | None = None
        self._frozen_copy: LanguageModel | None = None
        self._resumes_adapter = loaded.adapter is not None
        self._adapter_name = loaded.name if self._resumes_adapter else "lora_config"
        if loaded.adapter is not None:
            self._adapted = load_adapter(causal_lm, loaded.adapter, loaded.revision)
        with self._adapter_errors() if self._resumes_adapter else nullcontext():
            self._reference_logits = self._probe_logits(self.language_model)
        if loaded.adapter is None:
            adapter = None if lora is None else peft_config(lora, causal_lm)
            if adapter is None or not adapter_off_is_base(adapter):
                _check_base_weights(causal_lm, adapter)  # the copy takes time and memory
                self._frozen_copy = LanguageModel(_frozen_copy(causal_lm))
            if adapter is not None:
                self._adapted = new_adapter(causal_lm, adapter, seed, loaded.revision)
        elif lora is not None:
            logger.warning("%s is an adapter with its own settings: lora_config is ignored.", loaded.name)
        switch_off_dropout(causal_lm)
        causal_lm.eval()
        if gradient_checkpointing and not self.language_model.checkpointed_layers:
            raise ConfigError(
                f"gradient_checkpointing=True: {type(causal_lm).__name__} has no layers that support it. Set it to "
                "False, and raise gradient_accumulation_steps to save memory."
            )

        self.value_head = ValueHead(causal_lm.get_output_embeddings().weight, causal_lm.device)
        named = self._find_trainable()
        _check_precision(named)
        self._load_original = load_original
        if self._adapted is not None:
            self._check_adapter(named.values())
        if not self.has_frozen_copy and self.language_model.widen_head():
            with self.reference() as reference:
                self._reference_logits = self.reference_logits(self._probe_hidden(reference))

    def _find_trainable(self) -> dict[str, nn.Parameter]:
        """Find what is trained, the value head last; return those weights that are the model's."""
        named = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        of_values = {f"value_head.{name}": weight for name, weight in self.value_head.named_parameters()}
        self._trainable: dict[str, nn.Parameter] = named | of_values
        return named

    def shard(self, world: World, device: torch.device, sharded_sampling: bool | None) -> None:
        """Divide the weights, which are on the CPU, among the processes, and move this one's part to its device.

        With an adapter, only the frozen weights are divided; see `fsdp.py`.

        Raises:
            ConfigError: The model cannot be divided.
        """
        from konic.finetuning.models.fsdp import Sharded

        if self.language_model.wide_head is not None:
            raise ConfigError("TrainingConfig(sharding='fsdp') divides weights in float32 only: leave out dtype.")
        kept: set[nn.Parameter] = set()
        if self._adapted is not None:
            kept = {
                weight
                for name, weight in self._adapted.named_parameters()
                if weight.requires_grad or f".{REFERENCE_ADAPTER}." in name
            }
        for tensor in (*kept, *self.value_head.parameters()):
            tensor.data = tensor.to(device)
        self._probe, self._reference_logits = self._probe.to(device), self._reference_logits.to(device)
        models = [self.language_model] if self._frozen_copy is None else [self.language_model, self._frozen_copy]
        self.sharding = Sharded(models, kept, world, device, sharded_sampling)
        self._find_trainable()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.language_model.causal_lm.device

    @property
    def precision(self) -> str:
        """The dtype in which the model computes, such as "bfloat16"."""
        return str(self.language_model.causal_lm.dtype).removeprefix("torch.")

    @property
    def has_frozen_copy(self) -> bool:
        """True if the reference is a copy of the model, because weights of the model itself change."""
        return self._frozen_copy is not None

    @property
    def uses_lora(self) -> bool:
        """True with an adapter, False in full finetuning."""
        return self._adapted is not None

    @property
    def model(self) -> PreTrainedModel | peft.PeftModel:
        """The model to inspect or save, with its adapter if it has one."""
        return self._adapted if self._adapted is not None else self.language_model.causal_lm

    @property
    def decode_plan(self) -> DecodePlan:
        """How responses are sampled on a CPU, from the policy and from its reference."""
        return self.language_model.decode_plan

    @decode_plan.setter
    def decode_plan(self, plan: DecodePlan) -> None:
        for model in filter(None, (self.language_model, self._frozen_copy)):
            model.decode_plan = plan

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return every trainable parameter by name. Those of the value head come last."""
        return dict(self._trainable)

    @contextmanager
    def saving_memory(self) -> Iterator[None]:
        """Compute layers twice inside the context if gradient checkpointing is on. Train mode is never used."""
        checkpointed = self.language_model.checkpointed() if self._gradient_checkpointing else nullcontext()
        with eager_free(self._gradient_checkpointing), checkpointed:
            yield

    def fast_products(self) -> AbstractContextManager[None]:
        """Return a context manager: whole sequences are read by the library that is fastest on this processor."""
        return fast_products(self.model) if self.sharding is NOT_SHARDED else nullcontext()

    @contextmanager
    def reference(self) -> Iterator[LanguageModel]:
        """Yield the reference policy.

        It is the model with the adapter switched off, or with the adapter as it was loaded, or a frozen copy.
        """
        if self._frozen_copy is not None:
            yield self._frozen_copy
        elif self._adapted is not None and self._resumes_adapter:
            self._adapted.set_adapter(REFERENCE_ADAPTER)
            try:
                yield self.language_model
            finally:
                self._adapted.set_adapter("default")
        elif self._adapted is not None:
            # not `PeftModel.disable_adapter`, which first asks every layer for its state: as slow as a forward pass
            self._adapted.base_model.disable_adapter_layers()
            try:
                yield self.language_model
            finally:
                self._adapted.base_model.enable_adapter_layers()

    @torch.no_grad()
    def reference_logits(self, hidden: Tensor) -> Tensor:
        """Return the reference's logits [..., V] for its own hidden states [..., H], in fp32 or better."""
        head = self.language_model.causal_lm.get_output_embeddings()
        if self._frozen_copy is None and not isinstance(head, BaseTunerLayer | AuxiliaryTrainingWrapper):
            return self.language_model.logits(hidden)  # policy and reference share the head
        with self.reference() as reference:
            return reference.logits(hidden)

    @contextmanager
    def merged_adapter(self, reference: bool = False) -> Iterator[LanguageModel]:
        """Yield the policy with each adapter merged into a copy of its layer, for sampling with fewer, larger products.

        The original layers are set aside and put back. They are never merged and unmerged, because rounding would
        change the reference. With `reference`, the context yields the reference instead, also with plain layers.
        """
        with self.reference() if reference else nullcontext(self.language_model) as model:
            if model.in_step:  # each process has only a part of a layer
                yield model
                return
            originals = [
                (parent, name, layer)
                for parent in model.causal_lm.modules()
                for name, layer in parent.named_children()
                if isinstance(layer, LoraLayer) and can_merge(layer)
            ]
            try:
                for parent, name, layer in originals:
                    plain = layer.get_base_layer() if layer.disable_adapters else merged_layer(layer)
                    setattr(parent, name, plain)
                yield model
            finally:
                with uninterrupted():
                    for parent, name, layer in originals:
                        setattr(parent, name, layer)

    def check_reference(self) -> None:
        """Raise TrainingError if the reference is no longer the model that was loaded, judged by its logits."""
        with self.sharding.passes():
            difference = self._reference_difference()
        if not difference <= MAX_REFERENCE_DIFFERENCE:
            raise TrainingError(
                f"The reference policy has moved: its logits differ by {difference:.2g} from the loaded model's. "
                "Something changes weights outside the adapter. Use an adapter that does not change the base model."
            )

    def _check_adapter(self, weights: Iterable[nn.Parameter]) -> None:
        """Raise ConfigError unless the adapter can be switched off, and merged, however far its weights move."""
        name, kind = self._adapter_name, type(self.language_model.causal_lm).__name__
        with self._adapter_errors(), moved_weights(weights):
            adapted = self._probe_logits(self.language_model)
            difference = self._reference_difference()
            with self.merged_adapter() as model:
                merged = self._probe_logits(model)
        effect = (adapted - self._reference_logits).norm()
        if effect == 0:
            raise ConfigError(
                f"{name}: its layers take no part when {kind} reads text, so training would change nothing. "
                f"{self._advice('Name other target_modules, or leave them out to use the default.')}"
            )
        if not difference <= MAX_REFERENCE_DIFFERENCE:
            raise ConfigError(
                f"{name}: with the adapter switched off, the logits of {kind} differ by {difference:.2g} from those of "
                f"the loaded model. {self._advice('Use target_modules without other options of PEFT.')}"
            )
        rounding = ROUNDING_IN_16_BITS if self.language_model.causal_lm.dtype.itemsize < 4 else 0.0
        if not (merged - adapted).norm() <= MAX_MERGED_DIFFERENCE * effect + rounding * self._reference_logits.norm():
            advice = (
                "Name other target_modules; a layer whose weights are used without calling it, such as some routers, "
                "cannot be adapted."
            )
            raise ConfigError(
                f"{name}: once merged, the logits of {kind} differ by {(merged - adapted).abs().max().item():.2g} from "
                f"those with the adapter. {self._advice(advice)}"
            )

    @contextmanager
    def _adapter_errors(self) -> Iterator[None]:
        """Raise what PEFT raises inside the context as one ConfigError that names the adapter."""
        try:
            yield
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{self._adapter_name}: {type(self.language_model.causal_lm).__name__} cannot be run with this "
                f"adapter: {describe_error(error)}. "
                f"{self._advice('Name other target_modules; routers cannot be adapted.')}"
            ) from safe_cause(error)

    def _advice(self, for_new_adapter: str) -> str:
        """Return what to do about an adapter that cannot be used: a saved one has no lora_config to change."""
        return for_new_adapter if not self._resumes_adapter else "Train the adapter again with other options of PEFT."

    def _reference_difference(self) -> float:
        """Return how far the reference's logits are from those of the loaded model."""
        with self.reference() as reference:
            hidden = self._probe_hidden(reference)
        return (self.reference_logits(hidden) - self._reference_logits).abs().max().item()

    def save(self, folder: Path | None) -> None:
        """Write the adapter (or the full model), the tokenizer and the value head to a folder, as safetensors.

        None, here and below, is for a process that only gives its part of the weights to the first one.
        """
        self.save_model(folder)
        if folder is not None:
            self.value_head.save(folder)

    def save_model(self, folder: Path | None) -> None:
        """Write the adapter (or the full model) and the tokenizer to a folder, as PEFT and `transformers` do."""
        if self._adapted is None:
            self._save_full(folder, self.language_model.causal_lm)
        elif folder is not None:
            self.save_adapter(folder)
            with quiet_transformers():
                self.tokenizer.save_pretrained(folder)

    def save_adapter(self, folder: Path) -> None:
        """Write the adapter alone to a folder, as PEFT does; the policy has one."""
        assert self._adapted is not None  # noqa: S101
        with quiet_transformers():
            self._adapted.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])

    def adapter_config(self) -> peft.LoraConfig:
        """Return PEFT's config of the adapter that is trained; the policy has one."""
        assert self._adapted is not None  # noqa: S101
        config = self._adapted.peft_config["default"]
        assert isinstance(config, peft.LoraConfig)  # noqa: S101
        return config

    def save_merged(self, folder: Path | None) -> None:
        """Write the full model, with the adapter merged in, and the tokenizer to a folder.

        Raises:
            ConfigError: The frozen weights are divided: they are merged where they are whole.
        """
        if self._adapted is None:
            self._save_full(folder, self.language_model.causal_lm)
        elif self.sharding is not NOT_SHARDED:
            raise ConfigError(
                "save_pretrained(merge=True): with sharding, no process holds the whole model. Save the adapter "
                "without merge, or merge it afterwards: konic export RUN --format merged"
            )
        elif folder is not None and self._load_original is not None:
            with TemporaryDirectory() as adapter:
                self.save_model(Path(adapter))
                self._save_full(folder, merge_into_base(attach_adapter(self._load_original(), Path(adapter))))
        elif folder is not None:
            self._save_full(folder, merged_model(self._adapted))

    def _save_full(self, folder: Path | None, model: PreTrainedModel) -> None:
        state = gathered(model.state_dict(), keep=folder is not None) if self.sharding.divides_trained else None
        if folder is not None:
            with quiet_transformers():
                model.save_pretrained(folder, state_dict=state)
                self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Load the weights that :meth:`save` wrote.

        Raises:
            ValueError: The adapter in the folder has different layers or a different rank.
        """
        if self._adapted is not None:
            weights = load_file(folder / "adapter_model.safetensors")
            own = peft.get_peft_model_state_dict(self._adapted, save_embedding_layers=False)
            if {name: t.shape for name, t in weights.items()} != {name: t.shape for name, t in own.items()}:
                raise ValueError("its adapter has different layers or a different rank than this run's adapter")
            peft.set_peft_model_state_dict(self._adapted, weights)
        else:
            if (folder / "adapter_config.json").exists():
                raise ValueError("it holds an adapter, and this run trains every weight")
            outside = find_outside(folder)
            if outside is not None:
                raise ValueError(outside)
            causal_lm = self.language_model.causal_lm
            with quiet_transformers():
                source = self._kind.from_pretrained(
                    folder, config=copy.deepcopy(causal_lm.config), dtype=causal_lm.dtype, use_safetensors=True,
                    trust_remote_code=False,
                )  # fmt: skip
            whole = source.state_dict()
            with torch.no_grad():
                for name, weight in causal_lm.state_dict().items():
                    own_part(weight).copy_(own_part(divided_like(weight, whole[name])))
        self.value_head.load(folder)

    @torch.no_grad()
    def _probe_logits(self, model: LanguageModel) -> Tensor:
        return model.logits(self._probe_hidden(model))

    @torch.no_grad()
    def _probe_hidden(self, model: LanguageModel) -> Tensor:
        mask = torch.ones_like(self._probe, dtype=torch.bool)
        return model.decode(self._probe, mask, position_ids(mask))


_IN_FLOAT32 = "Train in float32, or use LoRA without modules_to_save or bias: its weights stay in float32."


def _check_base_weights(causal_lm: PreTrainedModel, adapter: peft.LoraConfig | None) -> None:
    """Raise ConfigError if weights of the model itself are to be trained and cannot be."""
    trained = {name: weight for name, weight in causal_lm.named_parameters() if weight.requires_grad}
    if adapter is None and (not trained or getattr(causal_lm, "is_quantized", False)):
        raise ConfigError(
            f"lora_config=None trains every weight, but those of {type(causal_lm).__name__} are quantised or frozen. "
            "Give a lora_config."
        )
    if adapter is not None:
        trained = {name: weight for name, weight in trained.items() if adapter.bias != "none" and name.endswith("bias")}
    _require_no_float16(trained)


def _require_no_float16(trained: Mapping[str, nn.Parameter]) -> None:
    """Raise ConfigError for trained weights in float16.

    The squares of most gradients are below the smallest number of float16, so that Adam divides by its ε alone: the
    first step of SmolLM2 was 550 times as long as in float32.
    """
    name = next((name for name, weight in trained.items() if weight.dtype == torch.float16), None)
    if name is not None:
        raise ConfigError(f"{name} would be trained in float16, which Adam's steps do not survive. {_IN_FLOAT32}")


def _check_precision(trained: Mapping[str, nn.Parameter]) -> None:
    """Raise ConfigError for trained weights in float16, and warn of those in bfloat16."""
    _require_no_float16(trained)
    name = next((name for name, weight in trained.items() if weight.dtype.itemsize < 4), None)
    if name is not None:
        lost = "steps smaller than its rounding error are lost"
        logger.warning("%s is trained in %s: %s. %s", name, trained[name].dtype, lost, _IN_FLOAT32)


def _frozen_copy(causal_lm: PreTrainedModel) -> PreTrainedModel:
    frozen = copy.deepcopy(causal_lm).requires_grad_(False)
    size = sum(weight.numel() * weight.element_size() for weight in frozen.parameters())
    logger.warning("The reference policy is a frozen copy of the model. It needs %.0f MB more memory.", size / 1e6)
    return frozen
