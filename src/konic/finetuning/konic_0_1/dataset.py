"""The data, at the place where konic 0.1 had it."""

from typing import Any

from konic.finetuning.data.config import DatasetConfig, DatasetSource
from konic.finetuning.data.prompts import load_prompts
from konic.finetuning.successors import name_not_found

__all__ = ["DatasetConfig", "DatasetSource", "load_prompts"]


def __getattr__(name: str) -> Any:
    raise name_not_found(__name__, name)
