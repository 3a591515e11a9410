"""A chat template -> the names that it reads from outside."""

from functools import lru_cache
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.meta import TrackingCodeGenerator


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`, with which `transformers` marks the tokens of the assistant."""

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _NameFinder(TrackingCodeGenerator):
    """Finds the names that a template reads as `jinja2.meta` does, but computes no constants: they may be huge."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.optimizer = None

    def visit_Output(self, node: Any, frame: Any) -> None:  # noqa: N802 - the name of the node
        for child in node.nodes:
            self.visit(child, frame)


@lru_cache(maxsize=8)
def names_read(template: str) -> frozenset[str]:
    """Return the variables that a chat template takes from outside; its loop variables, keys and words are none."""
    environment = jinja2.Environment(extensions=[_Generation, loopcontrols])  # noqa: S701 - nothing is rendered
    environment.globals |= dict.fromkeys(("raise_exception", "strftime_now"))
    finder = _NameFinder(environment)
    finder.visit(environment.parse(template))
    return frozenset(finder.undeclared_identifiers)
