"""Parses YAML into plain values and records the line of each key.

Scalars follow YAML 1.2: `1e-3` is a number, `on` and `no` are strings, a date is a string.
Duplicate keys, aliases, tags, further documents and numbers with a leading zero are errors, because
in a job file each of them is a mistake.

In a value, `${NAME}` and `${NAME:-default}` are replaced by an environment variable, `$${` by `${`.
An unquoted value is typed after the replacement (`epochs: ${EPOCHS:-30}` is a number), a quoted one
is a string.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

Path = tuple[str | int, ...]
MAX_BYTES = 1_000_000
_MAX_DEPTH = 40
_TEXT = "tag:yaml.org,2002:str"
_VARIABLE = re.compile(r"\$(\$\{)|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")


class SourceError(Exception):
    """The text is not a valid job file; `line`, from 1, is where (None if unknown)."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


@dataclass
class Source:
    """Values, with the lines of their keys.

    Attributes:
        values: plain values.
        lines: line of each key, from 1, by path.
        variables: by path, the original text of strings in which variables were replaced.
    """

    values: Any
    lines: dict[Path, int] = field(default_factory=dict)
    variables: dict[Path, str] = field(default_factory=dict)

    def line(self, path: Path) -> int | None:
        """The line, from 1, of the longest prefix of `path` that is in the text."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


class AsWritten(str):
    """A string with variables that `write` does not escape."""


def read(
    text: bytes | str, environ: Mapping[str, str] | None = None, fill_in: bool = True
) -> Source:
    """Parse one YAML document.

    Args:
        text: the document.
        environ: environment variables.
        fill_in: whether to replace variables.

    Raises:
        SourceError: for anything but one plain document, and for a variable that is neither set nor
            has a default.

    >>> read("lr: 1e-3").values
    {'lr': 0.001}
    >>> read("{name: 'run-${JOB}', seed: 3}", {"JOB": "17"}).values
    {'name': 'run-17', 'seed': 3}
    """
    if isinstance(text, bytes):
        if len(text) > MAX_BYTES:
            raise SourceError(f"the file is too long: a job file has at most {MAX_BYTES:,} bytes")
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"the file is not UTF-8 text (byte {error.start})") from None
    try:
        _check_plain(text)
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return Source(None)
            lines: dict[Path, int] = {}
            variables: dict[Path, str] = {}
            _record(node, (), lines)
            if fill_in:
                _fill_in(node, (), loader, environ or {}, variables)
            return Source(loader.construct_document(node), lines, variables)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problem = " ".join(part for part in (error.context, error.problem) if part)
        if mark and re.search(
            r"\{.*\$\{", (text.splitlines() or [""])[min(mark.line, len(text.splitlines()) - 1)]
        ):
            problem += "; inside { }, put the variable in quotes"
        raise SourceError(f"not valid YAML: {problem}", mark.line + 1 if mark else None) from None
    except yaml.YAMLError as error:
        raise SourceError(f"not valid YAML: {' '.join(str(error).split())}") from None


def _check_plain(text: str) -> None:
    """Reject aliases, tags and deep nesting, from the events: PyYAML's composer is recursive."""
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            raise SourceError(
                f"the alias *{event.anchor} is not allowed; write the values out", _line_of(event)
            )
        tag = getattr(event, "tag", None)
        if tag is not None and tag != "!":
            short = tag.replace("tag:yaml.org,2002:", "!!")
            raise SourceError(
                f"the tag {short} is not allowed; write plain values", _line_of(event)
            )
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MAX_DEPTH:
            raise SourceError(f"nested deeper than {_MAX_DEPTH} levels", _line_of(event))


def _line_of(event: yaml.Event) -> int:
    return 1 if event.start_mark is None else event.start_mark.line + 1


def _record(node: yaml.Node, path: Path, lines: dict[Path, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise SourceError("a key must be a string", line)
            if key_node.tag != _TEXT:
                raise SourceError(
                    f"the key {key!r} is not read as a string: put it in quotes", line
                )
            if key in seen:
                raise SourceError(f"duplicate key {key!r}, on lines {seen[key]} and {line}", line)
            seen[key] = line
            lines[path + (key,)] = line
            _record(value_node, path + (key,), lines)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            lines[path + (number,)] = item.start_mark.line + 1
            _record(item, path + (number,), lines)


def _fill_in(
    node: yaml.Node,
    path: Path,
    loader: _Loader,
    environ: Mapping[str, str],
    variables: dict[Path, str],
) -> None:
    """Replace variables in the nodes of a document; record the original texts in `variables`."""
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            _fill_in(value_node, (*path, key_node.value), loader, environ, variables)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            _fill_in(item, (*path, number), loader, environ, variables)
    elif isinstance(node, yaml.ScalarNode) and "${" in node.value:
        original = node.value
        try:
            node.value = _VARIABLE.sub(lambda match: _value_of(match, environ), node.value)
        except LookupError as error:
            where = ".".join(map(str, path))
            raise SourceError(
                f"{where}: {error.args[0]}" if where else error.args[0], node.start_mark.line + 1
            ) from None
        if node.style is None:  # not quoted
            node.tag = loader.resolve(yaml.ScalarNode, node.value, (True, False))
        if node.tag == _TEXT and any(name for _, name, _ in _VARIABLE.findall(original)):
            variables[path] = original


def _value_of(match: re.Match[str], environ: Mapping[str, str]) -> str:
    escaped, name, default = match.groups()
    if escaped:
        return "${"
    if name is None:
        raise LookupError(
            "a variable is written ${NAME} or ${NAME:-default}, and a literal ${ as $${"
        )
    # As in a shell, the default of :- also replaces an empty variable
    value = environ.get(name) or default
    if value is None:
        value = environ.get(name)
    if value is None:
        raise LookupError(
            f"the variable {name} is not set; ${{{name}:-default}} gives it a default"
        )
    return value


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalar types of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


def _resolve(tag: str, pattern: str, first: str) -> None:
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first)
    )


_resolve("bool", "true|True|TRUE|false|False|FALSE", "tTfF")
_resolve("null", "~|null|Null|NULL|", "~nN\0")
_resolve("int", "[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789")
_resolve(
    "float",
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    "-+.0123456789",
)
_Loader.yaml_implicit_resolvers[""] = _Loader.yaml_implicit_resolvers.pop("\0")


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.lstrip("+")
    if re.match("-?0[0-9]", text):
        raise SourceError(
            f"{node.value} begins with a zero: YAML 1.1 reads it as octal, YAML 1.2 as decimal; "
            "remove the zero",
            node.start_mark.line + 1,
        )
    base = 16 if text.startswith("0x") else 8 if text.startswith("0o") else 10
    try:
        return int(text, base)
    except ValueError as error:  # Python limits integers to 4300 digits
        raise SourceError(str(error), node.start_mark.line + 1) from None


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `read` would not read as strings."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


# In quotes, so that it is read as a string whatever the value of the variable.
_Dumper.add_representer(
    AsWritten, lambda dumper, text: dumper.represent_scalar(_TEXT, str(text), style="'")
)


def write(values: Any) -> str:
    """Serialise plain values; `read` gives equal values back, whatever the environment.

    >>> write({"name": "1e3", "place": "${HOME}", "on": True}).splitlines()
    ["name: '1e3'", 'place: $${HOME}', 'on: true']
    """
    return yaml.dump(_escaped(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _escaped(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _escaped(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [_escaped(value) for value in values]
    return (
        values.replace("${", "$${")
        if isinstance(values, str) and not isinstance(values, AsWritten)
        else values
    )
