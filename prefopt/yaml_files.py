"""YAML files that people write: options and rubrics. What such a file can do is bounded before it is read.

Text, numbers, true, false and null, lists and mappings: numbers and words are those of YAML 1.2, so that
1e-4 is a number, and `no`, 012 and 1:30 are text. A key that is given twice is an error, and so are tags
(!!x), deep nesting, and aliases that would make a small file large.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from prefopt.errors import InputError
from prefopt.options import shown

MOST_BYTES = 200_000
MOST_VALUES = 20_000  # each alias counted with all that it stands for
DEEPEST = 30


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with the limits and the words of this page."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own

    def __init__(self, text: str):
        self.depth = 0
        super().__init__(text)

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node, unless it lies too deep or has a tag."""
        event = self.peek_event()
        wrong = "" if self.depth < DEEPEST else f"lists and mappings lie more than {DEEPEST} deep"
        if tag := getattr(event, "tag", None):
            wrong = f"the tag {tag.replace('tag:yaml.org,2002:', '!!')[:100]} is not read here; leave it out"
        if wrong:
            raise yaml.MarkedYAMLError(problem=wrong, problem_mark=event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


_NUMBER = r"[-+]?(0|[1-9][0-9]*)"
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", _NUMBER, "-+0123456789"),
    (
        "float",
        rf"({_NUMBER}(\.[0-9]*)?|[-+]?\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(file: str | Path) -> Any:
    """What a YAML file says; InputError, which names file and line, for one that cannot be read."""
    path = Path(file)
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"{file} is no file of text; name a YAML file")
        with path.open("rb") as stream:
            content = stream.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise InputError(
                f"{file} is larger than {MOST_BYTES} bytes; a YAML file of ours is not that long"
            )
        return parse_yaml(content.decode("utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is no UTF-8 text: byte {error.start}: {error.reason}") from error
    except InputError:
        raise
    except (OSError, ValueError) as error:  # a name with NUL is a ValueError
        raise InputError(f"{shown(str(file))} cannot be read: {getattr(error, 'strerror', error)}") from error


def parse_yaml(text: str, where: str) -> Any:
    """What a YAML text says; InputError, which says `where` and the line, for one that cannot be read."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, where)
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise InputError(f"{where}: {_said(error)}") from error
    except InputError:
        raise
    except ValueError as error:  # a whole number of thousands of digits
        raise InputError(f"{where}: a value cannot be read: {str(error)[:300]}") from error


def _count(node: yaml.Node, sizes: dict[int, int], where: str) -> int:
    """How many values a node stands for, each alias with all of its own; keys are checked on the way."""
    if id(node) in sizes:
        if sizes[id(node)] == 0:
            raise InputError(f"{where}, line {_line(node)}: an alias stands for what it is in; write it out")
        return sizes[id(node)]
    sizes[id(node)] = 0
    parts = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, where)
        parts = [part for pair in node.value for part in pair]
    size = 1 + sum(_count(part, sizes, where) for part in parts)
    if size > MOST_VALUES:
        raise InputError(
            f"{where}, line {_line(node)}: with its aliases (*name) it holds more than {MOST_VALUES} values; "
            "write out what you need"
        )
    sizes[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode, where: str) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise InputError(f"{where}, line {_line(key)}: a list or mapping is used as a key; a key is text")
        name = (key.tag, key.value)
        if name in lines:
            raise InputError(
                f"{where}: {key.value[:100]!r} is given in line {lines[name]} and in line {_line(key)}; "
                "keep one of them"
            )
        lines[name] = _line(key)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def _said(error: yaml.YAMLError) -> str:
    """PyYAML's message with its line, on one line."""
    mark = getattr(error, "problem_mark", None)
    problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    return (f"line {mark.line + 1}: " if mark else "") + " ".join(str(problem).split())[:500]
