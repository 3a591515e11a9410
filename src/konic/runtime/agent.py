"""A script's agent -> the agent that `konic train SCRIPT` trains."""

from typing import Any

from konic.finetuning.errors import ConfigError

_registered: list[Any] = []


def register_agent(agent_instance: Any, name: str) -> Any:
    """Make an agent the one that `konic train` trains; a script that runs by itself goes on.

    Args:
        agent_instance: A KonicFinetuningAgent, or any object with its getters.
        name: A name for it, which konic 0.1 asked for.

    Returns:
        The agent.

    Raises:
        ConfigError: It is a class, or the name is empty.
    """
    if isinstance(agent_instance, type):
        raise ConfigError(f"register_agent takes an agent, got the class {agent_instance.__name__}: add ().")
    if not isinstance(name, str) or not name:
        raise ConfigError(f"register_agent(agent, name={name!r}): the name must be a text.")
    _registered[:] = [agent_instance]
    return agent_instance


def get_registered_agent() -> tuple[Any, None]:
    """Return the agent registered last, or None; then None, where konic 0.1 had a class of environments."""
    return (_registered[-1] if _registered else None), None


def forget_registered_agent() -> None:
    """Start without a registered agent, before a script is loaded."""
    _registered.clear()
