"""A YAML file -> plain values, and the line of each. It is a stranger's file: bounded, and nothing in it is run."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from konic.finetuning.errors import ConfigError

Place = tuple[str | int, ...]
"""The keys and indices that lead to a value."""

_MOST_BYTES = 256 * 1024
_DEEPEST = 20
_MOST_ALIASES = 20
_MOST_VALUES = 50_000
_LONGEST_NUMBER = 1000
"""Characters; longer plain text is text."""
_NULLS = {"", "~", "null", "Null", "NULL"}
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]++\.?[0-9]*+|\.[0-9]++)([eE][-+]?[0-9]++)?")
_INFINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")
_BOOL_OF_1_1 = re.compile(r"yes|no|on|off", re.IGNORECASE)
_INT_OF_1_1 = re.compile(r"[-+]?(0[0-9_]+|0[box][0-9a-fA-F_]+|[0-9]++_[0-9_]*+|[0-9]++(:[0-5]?[0-9])++)")


class Document:
    """The values of a YAML file.

    Attributes:
        file: The file.
        values: Dicts, lists, texts, numbers, booleans and None.
    """

    def __init__(self, file: Path) -> None:
        self.file, self._lines, self._num_values = file, dict[Place, int](), 0
        text = self._text()
        try:
            self._check_events(yaml.parse(text, Loader=yaml.SafeLoader))
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.reader.ReaderError as error:
            raise self._error(f"the character {chr(error.character)!r} is not allowed.", error.position, text) from None
        except yaml.MarkedYAMLError as error:
            raise self._syntax_error(error) from None
        if not isinstance(root, MappingNode):
            raise ConfigError(f"{file}: it must hold settings, such as `base_model: smollm2-135m`.")
        self.values: dict[str, Any] = self._value(root, ())

    def line(self, *path: str | int) -> int | None:
        """Return the line of a key or of an element of a list; None where there is none."""
        return self._lines.get(path)

    def error(self, message: str, *path: str | int) -> ConfigError:
        """Return an error about a value: it names the file, and the line of the value or of what it is in."""
        while path and path not in self._lines:
            path = path[:-1]
        return self._at(self._lines[path] if path else None, message)

    def _at(self, line: int | None, message: str) -> ConfigError:
        return ConfigError(f"{self.file}{f', line {line}' if line else ''}: {message}")

    def _error(self, message: str, position: int, text: str) -> ConfigError:
        return self._at(text.count("\n", 0, position) + 1, message)

    def _text(self) -> str:
        try:
            with self.file.open("rb") as file:
                content = file.read(_MOST_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"{self.file}: cannot be read ({error.strerror}).") from None
        if len(content) > _MOST_BYTES:
            raise ConfigError(f"{self.file}: a YAML file may have {_MOST_BYTES // 1024} KB. Put prompts into a file.")
        try:
            return content.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise self._at(line, "it is not UTF-8. Save the file as UTF-8.") from None

    def _syntax_error(self, error: yaml.MarkedYAMLError) -> ConfigError:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or "it is not YAML"
        if "'\\t'" in problem:
            problem = "a tab: YAML is indented by spaces"
        elif "mapping values are not allowed" in problem:
            problem = "a second `:` in one line, or a wrong indent: put a text with `: ` into quotes"
        started = error.context_mark
        where = f" ({error.context}, line {started.line + 1})" if error.context and started else ""
        return self._at(mark.line + 1 if mark else None, f"{problem}{where}.")

    def _check_events(self, events: Iterable[yaml.Event]) -> None:
        """Refuse what would cost much, or could be read in two ways, before anything is built."""
        depth = num_aliases = num_documents = 0
        for event in events:
            line = event.start_mark.line + 1
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            num_aliases += isinstance(event, yaml.AliasEvent)
            num_documents += isinstance(event, yaml.DocumentStartEvent)
            if depth > _DEEPEST:
                raise self._at(line, f"it is nested more than {_DEEPEST} deep.")
            if num_aliases > _MOST_ALIASES:
                raise self._at(line, f"it has more than {_MOST_ALIASES} aliases (*name). Write the values out.")
            if num_documents > 1:
                raise self._at(line, "a second document starts (---). A file holds one.")
            if getattr(event, "tag", None) not in (None, "!"):
                raise self._at(line, f"the tag {event.tag} is not allowed: values are plain.")

    def _value(self, node: Node, path: Place) -> Any:
        self._num_values += 1
        line = node.start_mark.line + 1
        self._lines.setdefault(path, line)
        if len(path) > _DEEPEST or self._num_values > _MOST_VALUES:
            raise self._at(line, "its aliases (*name) make it endless, or too large. Write the values out.")
        if isinstance(node, SequenceNode):
            return [self._value(part, (*path, number)) for number, part in enumerate(node.value)]
        if isinstance(node, MappingNode):
            return dict(self._items(node, path))
        return self._scalar(node, line)

    def _items(self, node: MappingNode, path: Place) -> Iterator[tuple[str, Any]]:
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, ScalarNode):
                raise self._at(line, "a key must be a word.")
            key = key_node.value
            if key == "<<" and not key_node.style:
                raise self._at(line, "<< is not supported. Write the values out.")
            if (*path, key) in self._lines:
                raise self._at(line, f"{key!r} is given twice, also in line {self._lines[(*path, key)]}.")
            self._lines[(*path, key)] = line
            yield key, self._value(value_node, (*path, key))

    def _scalar(self, node: ScalarNode, line: int) -> Any:
        """Return a value by the rules of YAML 1.2, which reads 1e-3 as a number and a date as text.

        What YAML 1.1 and 1.2 read differently in a way that matters is refused.
        """
        text = node.value
        if node.style or len(text) > _LONGEST_NUMBER:  # in quotes, or a block
            return text
        if text in _NULLS:
            return None
        if text in _BOOLS:
            return _BOOLS[text]
        if _INT.fullmatch(text):
            return int(text)
        if _INT_OF_1_1.fullmatch(text):
            raise self._at(
                line, f"{text} can be several numbers in YAML. Write a plain number, such as 16, or text in quotes."
            )
        if _FLOAT.fullmatch(text):
            return float(text)
        if found := _INFINITE.fullmatch(text):
            return float(found[1] + found[2])
        if _BOOL_OF_1_1.fullmatch(text):
            raise self._at(
                line, f"{text} is a boolean in YAML 1.1 and text in 1.2. Write true or false, or '{text}' in quotes."
            )
        if text == "None":
            raise self._at(line, "None is text in YAML. Write null, or 'None' in quotes.")
        return text
