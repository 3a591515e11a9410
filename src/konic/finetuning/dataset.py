"""The data, at the place where konic 0.1 had it."""

from konic.finetuning.data.config import DatasetConfig, DatasetSource
from konic.finetuning.data.prompts import load_prompts

__all__ = ["DatasetConfig", "DatasetSource", "load_prompts"]
