"""A metric's declaration: its name, meaning, unit and source stand in one place, beside its field.

`results.iteration` declares them; `run.measures` fills those that come from the update, files write them, and the table
of docs/metrics.md is made from them.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

Source = Literal["trainer", "rollout", "rewards", "advantages", "update", "clock", "evaluation", "checks"]


@dataclass(frozen=True)
class Metric:
    """What a field of a record means."""

    meaning: str
    unit: str = ""
    """Empty for a pure number."""
    source: Source = "trainer"
    """The stage that it comes from."""


def declared_metrics(record: Any) -> dict[str, Metric]:
    """The declarations of a dataclass whose every field is `Annotated[type, Metric(...)]`, by name, in order."""
    hints = get_type_hints(record, include_extras=True)
    found = {}
    for field in dataclasses.fields(record):
        hint = hints[field.name]
        metrics = [extra for extra in get_args(hint) if isinstance(extra, Metric)]
        if get_origin(hint) is not Annotated or not metrics:
            raise TypeError(f"{field.name} of {record.__name__} declares no Metric")
        found[field.name] = metrics[0]
    return found
