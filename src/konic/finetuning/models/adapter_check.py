"""Logits -> ConfigError, or nothing: whether an adapter can be switched off, and merged, without harm."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from konic.finetuning.errors import ConfigError, safe_cause
from konic.text import describe_error

MAX_REFERENCE_DIFFERENCE = 1e-4
"""Largest difference between the logits of the reference and those of the loaded model."""
MAX_STARTING_DIFFERENCE = 1e-3
"""Largest difference that an untrained adapter makes, relative to the logits."""
MAX_MERGED_DIFFERENCE, MAX_MERGED_DIFFERENCE_IN_16_BITS = 0.01, 0.2
"""Largest difference of the logits of the merged and the unmerged adapter, relative to what the adapter changes."""
ROUNDING_IN_16_BITS = 0.1
"""What rounding may add to both in 16 bits, relative to the logits; it adds some hundredths."""


@dataclass(frozen=True)
class AdapterCheck:
    """Judges one adapter on one kind of model."""

    name: str
    """What the user knows it by: `lora_config`, or the name of a saved adapter."""
    kind: str
    """Class of the model."""
    is_saved: bool
    """True for a saved adapter, which has no settings to change."""

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise what PEFT raises inside the context as one ConfigError that names the adapter."""
        try:
            yield
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"{self.name}: {self.kind} cannot be run with this adapter: {describe_error(error)}. "
                f"{self._advice('Name other target_modules; routers cannot be adapted.')}"
            ) from safe_cause(error)

    def require_sound(
        self,
        at_start: Tensor,
        untrained: Tensor,
        moved: Tensor,
        merged: Tensor,
        reference_difference: float,
        in_16_bits: bool,
    ) -> None:
        """Raise ConfigError unless the adapter changes nothing at its start, and can be switched off and merged.

        Args:
            at_start: [1, T, V] logits of the loaded model.
            untrained: [1, T, V] those with the adapter as it starts.
            moved: [1, T, V] those with the adapter's weights moved away from their start.
            merged: [1, T, V] those with the moved adapter merged into the model's layers.
            reference_difference: Largest difference from `at_start` with the moved adapter switched off.
            in_16_bits: Whether the model computes in 16 bits.
        """
        rounding = ROUNDING_IN_16_BITS if in_16_bits else 0.0
        if not (untrained - at_start).norm() <= (MAX_STARTING_DIFFERENCE + rounding) * at_start.norm():
            raise ConfigError(
                f"{self.name}: with the untrained adapter, the logits of {self.kind} differ by "
                f"{(untrained - at_start).abs().max().item():.2g} from those of the loaded model, as where its start "
                "rewrites weights that another layer shares. "
                f"{self._advice('Set init_lora_weights=True, or name other target_modules.')}"
            )
        effect = (moved - at_start).norm()
        if effect == 0:
            raise ConfigError(
                f"{self.name}: its layers take no part when {self.kind} reads text, so training would change nothing. "
                f"{self._advice('Name other target_modules, or leave them out to use the default.')}"
            )
        if not reference_difference <= MAX_REFERENCE_DIFFERENCE:
            raise ConfigError(
                f"{self.name}: with the adapter switched off, the logits of {self.kind} differ by "
                f"{reference_difference:.2g} from those of the loaded model. "
                f"{self._advice('Use target_modules without other options of PEFT.')}"
            )
        share = MAX_MERGED_DIFFERENCE_IN_16_BITS if in_16_bits else MAX_MERGED_DIFFERENCE
        if not (merged - moved).norm() <= share * effect + rounding * at_start.norm():
            advice = (
                "Name other target_modules; a layer whose weights are used without calling it, such as some routers, "
                "cannot be adapted."
            )
            raise ConfigError(
                f"{self.name}: once merged, the logits of {self.kind} differ by "
                f"{(merged - moved).abs().max().item():.2g} from those with the adapter. {self._advice(advice)}"
            )

    def _advice(self, for_new_adapter: str) -> str:
        """Return what to do about an adapter that cannot be used."""
        return for_new_adapter if not self.is_saved else "Train the adapter again with other options of PEFT."
