"""The declaration of a metric: its name, meaning, unit and source are in one place, next to its field.

`results.iteration` declares the metrics, `run.measures` fills them, and the files of a run
store them. docs/make.py writes the table of docs/metrics.md from the declarations.
"""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

Source = Literal["trainer", "rollout", "rewards", "advantages", "update", "clock", "evaluation", "checks"]


@dataclass(frozen=True)
class Metric:
    """The meaning, unit and source of a record's field."""

    meaning: str
    unit: str = ""
    """Empty for a pure number."""
    source: Source = "trainer"
    """The stage that computes the value."""


def declared_metrics(record: Any) -> dict[str, Metric]:
    """The metrics of a dataclass by field name, in order.

    Raises:
        TypeError: A field is not declared as `Annotated[type, Metric(...)]`.
    """
    hints = get_type_hints(record, include_extras=True)
    found = {}
    for field in dataclasses.fields(record):
        hint = hints[field.name]
        metrics = [extra for extra in get_args(hint) if isinstance(extra, Metric)]
        if get_origin(hint) is not Annotated or not metrics:
            raise TypeError(f"{field.name} of {record.__name__} declares no Metric")
        found[field.name] = metrics[0]
    return found
