"""The callbacks, at the place where konic 0.1 had them."""

from konic.finetuning.callbacks.composite import CompositeCallback
from konic.finetuning.callbacks.console import KonicFinetuningCallback
from konic.finetuning.callbacks.hooks import BaseKonicFinetuningCallback

__all__ = ["BaseKonicFinetuningCallback", "CompositeCallback", "KonicFinetuningCallback"]
