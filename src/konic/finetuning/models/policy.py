"""LoadedModel + LoraConfig -> Policy: base model, adapter, value head and reference policy.

With a new LoRA adapter, the reference policy is the same weights with the adapter switched off.
:meth:`Policy.reference` lists the other cases.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from konic.finetuning.config import LoraConfig
from konic.finetuning.errors import ConfigError, TrainingError
from konic.finetuning.models.adapter_check import MAX_REFERENCE_DIFFERENCE, AdapterCheck
from konic.finetuning.models.adapter_config import adapter_off_is_base, peft_config
from konic.finetuning.models.adapters import (
    REFERENCE_ADAPTER,
    load_adapter,
    moved_weights,
    new_adapter,
    switch_off_dropout,
)
from konic.finetuning.models.gated_mlps import lean_mlps
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.loading import LoadedModel
from konic.finetuning.models.merging import can_merge, merged_layer
from konic.finetuning.models.positions import position_ids
from konic.finetuning.models.prepacked import DecodePlan
from konic.finetuning.models.products import fast_products
from konic.finetuning.models.sharding import NOT_SHARDED, Sharding
from konic.finetuning.models.trained_weights import check_base_weights, check_precision
from konic.finetuning.models.value_head import ValueHead
from konic.finetuning.system.memory import eager_free
from konic.finetuning.system.signals import uninterrupted
from konic.finetuning.system.world import World
from konic.output import get_logger

logger = get_logger(__name__)


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
        """Build a policy. `load_original` loads the base to merge into, if `loaded` holds it rounded or quantised."""
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        causal_lm = loaded.model
        self.language_model = LanguageModel(causal_lm)
        self.sharding: Sharding = NOT_SHARDED
        self.kind = type(causal_lm)
        """Class of the model; dividing the weights changes that of the object."""
        switch_off_dropout(causal_lm)
        self._gradient_checkpointing = gradient_checkpointing
        self.language_model.shares_prompts = not gradient_checkpointing  # in scoring too: the same way in every pass
        self._probe = self.language_model.probe_ids(8)[None]
        self.adapted: peft.PeftModel | None = None
        self._frozen_copy: LanguageModel | None = None
        self.resumes_adapter = loaded.adapter is not None
        """True if the base model came with an adapter, whose training goes on."""
        self._adapter_check = AdapterCheck(
            loaded.name if self.resumes_adapter else "lora_config", type(causal_lm).__name__, self.resumes_adapter
        )
        if loaded.adapter is not None:
            self.adapted = load_adapter(causal_lm, loaded.adapter, loaded.revision)
            switch_off_dropout(causal_lm)
        with self._adapter_check.errors() if self.resumes_adapter else nullcontext():
            self._reference_logits = self._probe_logits(self.language_model)
        if loaded.adapter is None:
            adapter = None if lora is None else peft_config(lora, causal_lm)
            if adapter is None or not adapter_off_is_base(adapter):
                check_base_weights(causal_lm, adapter)  # the copy takes time and memory
                self._frozen_copy = LanguageModel(_frozen_copy(causal_lm))
                self._frozen_copy.shares_prompts = not gradient_checkpointing
            if adapter is not None:
                self.adapted = new_adapter(causal_lm, adapter, seed, loaded.revision)
        elif lora is not None:
            logger.warning("%s is an adapter with its own settings: lora_config is ignored.", loaded.name)
        switch_off_dropout(causal_lm)
        if gradient_checkpointing and not self.language_model.checkpointed_layers:
            raise ConfigError(
                f"gradient_checkpointing=True: {type(causal_lm).__name__} has no layers that support it. Set it to "
                "False, and raise gradient_accumulation_steps to save memory."
            )

        self.value_head = ValueHead(causal_lm.get_output_embeddings().weight, causal_lm.device)
        named = self._find_trainable()
        check_precision(named)
        self.load_original = load_original
        """Loads the base model for merging; None if it is the one here."""
        if self.adapted is not None:
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
            self.language_model.wide_head.keep_nothing()
        kept: set[nn.Parameter] = set()
        if self.adapted is not None:
            kept = {
                weight
                for name, weight in self.adapted.named_parameters()
                if weight.requires_grad or f".{REFERENCE_ADAPTER}." in name
            }
        if not kept and self.language_model.causal_lm.dtype.itemsize < 4:
            raise ConfigError(
                "TrainingConfig(sharding='fsdp') divides weights that are trained in float32 or float64 only: leave "
                "dtype out of model_kwargs, or give a lora_config."
            )
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
        return self.adapted is not None

    @property
    def model(self) -> PreTrainedModel | peft.PeftModel:
        """The model to inspect or save, with its adapter if it has one."""
        return self.adapted if self.adapted is not None else self.language_model.causal_lm

    @property
    def decode_plan(self) -> DecodePlan:
        """How responses are sampled on a CPU, from the policy and from its reference."""
        return self.language_model.decode_plan

    @decode_plan.setter
    def decode_plan(self, plan: DecodePlan) -> None:
        for model in filter(None, (self.language_model, self._frozen_copy)):
            model.decode_plan = plan

    def allow_graphs(self, is_graphable: bool) -> None:
        """Let decode steps be replayed as a graph; see `LanguageModel.is_graphable`."""
        for model in filter(None, (self.language_model, self._frozen_copy)):
            model.is_graphable = is_graphable

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return every trainable parameter by name. Those of the value head come last."""
        return dict(self._trainable)

    @contextmanager
    def saving_memory(self) -> Iterator[None]:
        """Keep less for the backward pass inside the context. Train mode is never used.

        With gradient checkpointing, layers are computed twice.
        """
        checkpointed = self.language_model.checkpointed() if self._gradient_checkpointing else nullcontext()
        with eager_free(self._gradient_checkpointing), checkpointed, lean_mlps(self.model):
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
        elif self.adapted is not None and self.resumes_adapter:
            self.adapted.set_adapter(REFERENCE_ADAPTER)
            try:
                yield self.language_model
            finally:
                self.adapted.set_adapter("default")
        elif self.adapted is not None:
            with self.adapter_off():
                yield self.language_model

    @contextmanager
    def adapter_off(self) -> Iterator[None]:
        """Compute without the adapter inside the context; a policy without one stays as it is."""
        if self.adapted is None:
            yield
            return
        # not `PeftModel.disable_adapter`, which first asks every layer for its state: as slow as a forward pass
        self.adapted.base_model.disable_adapter_layers()
        try:
            yield
        finally:
            self.adapted.base_model.enable_adapter_layers()

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
        with self._adapter_check.errors():
            untrained = self._probe_logits(self.language_model)
            with moved_weights(weights):
                moved, difference = self._probe_logits(self.language_model), self._reference_difference()
                with self.merged_adapter() as model:
                    merged = self._probe_logits(model)
        in_16_bits = self.language_model.in_16_bits
        self._adapter_check.require_sound(self._reference_logits, untrained, moved, merged, difference, in_16_bits)

    def _reference_difference(self) -> float:
        """Return how far the reference's logits are from those of the loaded model."""
        with self.reference() as reference:
            hidden = self._probe_hidden(reference)
        return (self.reference_logits(hidden) - self._reference_logits).abs().max().item()

    def adapter_config(self) -> peft.LoraConfig:
        """Return PEFT's config of the adapter that is trained; the policy has one."""
        assert self.adapted is not None  # noqa: S101
        config = self.adapted.peft_config["default"]
        assert isinstance(config, peft.LoraConfig)  # noqa: S101
        return config

    @torch.no_grad()
    def _probe_logits(self, model: LanguageModel) -> Tensor:
        return model.logits(self._probe_hidden(model))

    @torch.no_grad()
    def _probe_hidden(self, model: LanguageModel) -> Tensor:
        mask = torch.ones_like(self._probe, dtype=torch.bool)
        return model.decode(self._probe, mask, position_ids(mask))


def _frozen_copy(causal_lm: PreTrainedModel) -> PreTrainedModel:
    frozen = copy.deepcopy(causal_lm).requires_grad_(False)
    size = sum(weight.numel() * weight.element_size() for weight in frozen.parameters())
    logger.warning("The reference policy is a frozen copy of the model. It needs %.0f MB more memory.", size / 1e6)
    return frozen
