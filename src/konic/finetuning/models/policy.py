"""Base model + adapter + value head = Policy. The reference is the same weights with the adapter switched off."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from konic.finetuning.config import LoraConfig
from konic.finetuning.errors import TrainingError
from konic.finetuning.models.adapters import (
    REFERENCE_ADAPTER,
    adapter_off_is_base,
    can_merge,
    load_adapter,
    merged_layer,
    new_adapter,
    peft_config,
    switch_off_dropout,
)
from konic.finetuning.models.language_model import LanguageModel
from konic.finetuning.models.loading import LoadedModel
from konic.finetuning.models.locations import quiet_transformers
from konic.finetuning.models.positions import position_ids
from konic.finetuning.models.value_head import ValueHead
from konic.finetuning.system.memory import eager_free
from konic.finetuning.system.signals import uninterrupted

logger = logging.getLogger(__name__)


class Policy:
    """The model that learns, with the reference it is held to and the value head on its last hidden state."""

    def __init__(
        self,
        loaded: LoadedModel,
        lora: LoraConfig | peft.LoraConfig | None,
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        self.tokenizer: PreTrainedTokenizerBase = loaded.tokenizer
        causal_lm = loaded.model
        self.language_model = LanguageModel(causal_lm)
        self.language_model.check_logits()
        switch_off_dropout(causal_lm)
        self._gradient_checkpointing = gradient_checkpointing
        self._probe = torch.arange(3, 11, device=causal_lm.device)[None] % causal_lm.config.get_text_config().vocab_size
        causal_lm.eval()
        self._adapted: peft.PeftModel | None = None
        self._frozen_copy: LanguageModel | None = None
        self._resumes_adapter = loaded.adapter is not None
        if loaded.adapter is not None:
            self._adapted = load_adapter(causal_lm, loaded.adapter)
        self._reference_logits = self._probe_logits(self.language_model)
        if loaded.adapter is None:
            adapter = None if lora is None else peft_config(lora, causal_lm)
            if adapter is None or not adapter_off_is_base(adapter):
                self._frozen_copy = LanguageModel(_frozen_copy(causal_lm))
            if adapter is not None:
                self._adapted = new_adapter(causal_lm, adapter, seed)
        elif lora is not None:
            logger.warning("%s is an adapter and brings its own settings: lora_config is not used.", loaded.name)
        if self._adapted is None and causal_lm.dtype.itemsize < 4:
            logger.warning(
                "Full finetuning in %s: steps smaller than its rounding are lost. Train in float32, or with LoRA, "
                "whose weights stay in float32.",
                causal_lm.dtype,
            )
        switch_off_dropout(causal_lm)
        if gradient_checkpointing:
            causal_lm.activation_checkpointing_enable({"use_reentrant": False})
        causal_lm.eval()

        self.value_head = ValueHead(causal_lm.get_output_embeddings().weight, causal_lm.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.language_model.causal_lm.device

    @property
    def uses_lora(self) -> bool:
        """True with an adapter, False in full finetuning."""
        return self._adapted is not None

    @property
    def model(self) -> PreTrainedModel | peft.PeftModel:
        """The model to look at or save: with its adapter, if it has one."""
        return self._adapted if self._adapted is not None else self.language_model.causal_lm

    def trainable(self) -> dict[str, nn.Parameter]:
        """Every parameter that learns, by name, the value head's last."""
        named = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        return named | {f"value_head.{name}": weight for name, weight in self.value_head.named_parameters()}

    @contextmanager
    def training_mode(self) -> Iterator[None]:
        """Within it gradient checkpointing works, if it is on: `transformers` does it in train mode only."""
        self.language_model.causal_lm.train(self._gradient_checkpointing)
        try:
            with eager_free(self._gradient_checkpointing):
                yield
        finally:
            self.language_model.causal_lm.eval()

    @contextmanager
    def reference(self) -> Iterator[LanguageModel]:
        """The model that the policy is held to: the adapter switched off, or as it was loaded, or a frozen copy."""
        if self._frozen_copy is not None:
            yield self._frozen_copy
        elif self._adapted is not None and self._resumes_adapter:
            self._adapted.set_adapter(REFERENCE_ADAPTER)
            try:
                yield self.language_model
            finally:
                self._adapted.set_adapter("default")
        elif self._adapted is not None:
            with self._adapted.disable_adapter():
                yield self.language_model

    @torch.no_grad()
    def reference_logits(self, hidden: Tensor) -> Tensor:
        """The reference's logits [..., V] of its own hidden states [..., H], in fp32 or better."""
        head = self.language_model.causal_lm.get_output_embeddings()
        if self._frozen_copy is None and not isinstance(head, BaseTunerLayer | ModulesToSaveWrapper):
            return self.language_model.logits(hidden)  # one head for both: nothing to switch off
        with self.reference() as reference:
            return reference.logits(hidden)

    @contextmanager
    def merged_adapter(self, reference: bool = False) -> Iterator[LanguageModel]:
        """The policy with each adapter merged into a copy of its layer, for sampling: fewer, larger products.

        The layers themselves are put aside and back, never merged and unmerged: rounding would move the reference.
        `reference` gives the reference instead, with its layers as plain.
        """
        with self.reference() if reference else nullcontext(self.language_model) as model:
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
        """Raise TrainingError if the reference is no longer the model that was loaded."""
        with self.reference() as reference:
            difference = (self._probe_logits(reference) - self._reference_logits).abs().max().item()
        if not difference <= 1e-4:
            raise TrainingError(
                f"The reference policy has moved: its logits differ by {difference:.2g} from the loaded model's. "
                "Something trains weights outside the adapter; use an adapter that leaves the base model alone."
            )

    def save(self, folder: Path) -> None:
        """Write the adapter (or the full model), the tokenizer and the value head into a folder, as safetensors."""
        self.save_model(folder)
        self.value_head.save(folder)

    def save_model(self, folder: Path) -> None:
        """Write the adapter (or the full model) and the tokenizer into a folder, as PEFT and `transformers` do."""
        with quiet_transformers():
            if self._adapted is not None:
                self._adapted.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])
            else:
                self.language_model.causal_lm.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def save_merged(self, folder: Path) -> None:
        """Write the full model with the adapter merged in, and the tokenizer."""
        model = self.language_model.causal_lm
        if self._adapted is not None:
            model = copy.deepcopy(self._adapted).merge_and_unload()
        with quiet_transformers():
            model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Take the weights that :meth:`save` wrote."""
        if self._adapted is not None:
            weights = load_file(folder / "adapter_model.safetensors")
            own = peft.get_peft_model_state_dict(self._adapted, save_embedding_layers=False)
            if {name: t.shape for name, t in weights.items()} != {name: t.shape for name, t in own.items()}:
                raise ValueError("its adapter has other layers or another rank than this run's")
            peft.set_peft_model_state_dict(self._adapted, weights)
        else:
            with quiet_transformers():
                source = type(self.language_model.causal_lm).from_pretrained(
                    folder, dtype=self.language_model.causal_lm.dtype, use_safetensors=True
                )
            self.language_model.causal_lm.load_state_dict(source.state_dict())
        self.value_head.load(folder)

    def _probe_logits(self, model: LanguageModel) -> Tensor:
        mask = torch.ones_like(self._probe, dtype=torch.bool)
        with torch.no_grad():
            return model.logits(model.decode(self._probe, mask, position_ids(mask)))


def _frozen_copy(causal_lm: PreTrainedModel) -> PreTrainedModel:
    frozen = copy.deepcopy(causal_lm).requires_grad_(False)
    size = sum(weight.numel() * weight.element_size() for weight in frozen.parameters())
    logger.warning("The reference policy is a frozen copy of the model: %.0f MB more memory.", size / 1e6)
    return frozen
