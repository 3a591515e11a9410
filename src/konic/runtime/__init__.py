"""The agent of a script, registered as konic 0.1 did it."""

from typing import Any

from konic.finetuning.successors import name_not_found
from konic.runtime.agent import get_registered_agent, register_agent

__all__ = ["get_registered_agent", "register_agent"]


def __getattr__(name: str) -> Any:
    raise name_not_found(__name__, name)
