"""Explains the keys of the job file from its JSON Schema, as text and as Markdown."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from hvdlarge.config.json_schema import job_schema
from hvdlarge.config.nearest import nearest
from hvdlarge.config.registry import OWN_PATTERN
from hvdlarge.exits import JobError

Schema = dict[str, Any]
_WIDTH = 88
OWN_PART = "package.module:Class"


def explain(key: str) -> str:
    """The type, default and description of a key of the job file, and of the keys in its section.

    Args:
        key: dotted, such as `lr.warmup`; empty for the whole job file.

    Raises:
        JobError: for an unknown key, naming the nearest one.

    >>> print(explain("lr.base"))
    lr.base: number > 0, required
        Learning rate tuned for a global batch of `batch.base`.
    """
    schema = job_schema()
    entries: list[tuple[Schema, str]] = [(schema, "")]  # each with its choice, see _choice
    required = False
    path: list[str] = []
    for part in key.split(".") if key else []:
        sections = [section for entry, _ in entries for section in _sections(entry, schema)]
        known = list(dict.fromkeys(name for section in sections for name in section["properties"]))
        if part not in known:
            raise JobError(_unknown(part, path, known))
        holders = [section for section in sections if part in section["properties"]]
        entries = [(section["properties"][part], _choice(section)) for section in holders]
        required = all(part in _required(section) for section in holders)
        path.append(part)
    if not key:
        return "\n\n".join(_keys(schema, schema, ""))
    return "\n\n".join(_lines(key, entries, schema, required))


def reference() -> str:
    """Every key of the job file as Markdown: one table per section, or per choice of a section."""
    schema = job_schema()
    plain = {
        key: entry
        for key, entry in schema["properties"].items()
        if not list(_sections(entry, schema))
    }
    tables = [_table("Top level", "", {**schema, "properties": plain}, schema)]
    for key, entry in schema["properties"].items():
        tables += _tables(key, entry, schema)
    return "\n\n".join(tables)


def _tables(key: str, entry: Schema, schema: Schema) -> Iterator[str]:
    sections = list(_sections(entry, schema))
    if len(sections) > 1:
        yield f"### `{key}`\n\n{entry.get('description', '')}"
    for section in sections:
        choice = _choice(section)
        title = f"`{key}: {{{_tag(section)}: {choice}}}`" if choice else f"`{key}`"
        about = section["properties"][_tag(section)] if choice else entry
        yield _table(title, about.get("description", ""), section, schema)
        for name, inner in section["properties"].items():
            yield from _tables(f"{key}.{name}", inner, schema)


def _table(title: str, about: str, section: Schema, schema: Schema) -> str:
    rows = []
    for name, entry in section["properties"].items():
        if not _is_choice(entry):
            kind = _kind(entry, schema).replace("|", "\\|")
            default = "" if entry.get("default") is None else f"`{json.dumps(entry['default'])}`"
            default = "*required*" if name in _required(section) else default
            meaning = _meaning(entry).replace("|", "\\|")
            rows.append(f"| `{name}` | {kind} | {default} | {meaning} |")
    head = "| key | value | default | meaning |\n|---|---|---|---|\n"
    return "\n\n".join(
        part for part in (f"### {title}", about, head + "\n".join(rows) if rows else "") if part
    )


def _lines(
    key: str, entries: list[tuple[Schema, str]], schema: Schema, required: bool
) -> Iterator[str]:
    entry, _ = entries[0]
    if not list(_sections(entry, schema)):
        is_same = len({json.dumps(entry, sort_keys=True) for entry, _ in entries}) == 1
        for entry, choice in entries[:1] if is_same else entries:
            yield _described(key if is_same else f"{key} ({choice})", entry, schema, required)
        return
    yield _described(key, entry, schema, required)
    for section in _sections(entry, schema):
        if choice := _choice(section):
            tag = section["properties"][_tag(section)]
            yield f"{key}: {{{_tag(section)}: {choice}, …}}\n    {tag['description']}"
        yield from _keys(section, schema, f"{key}.")


def _tag(section: Schema) -> str:
    return "policy" if "policy" in section["properties"] else "name"


def _choice(section: Schema) -> str:
    """The policy or name that selects a section; empty for a section without alternatives."""
    tag = section["properties"].get(_tag(section), {})
    return OWN_PART if _names_own(tag) else str(tag.get("const", ""))


def _names_own(entry: Schema) -> bool:
    return bool(entry.get("pattern") == OWN_PATTERN)


def _is_choice(entry: Schema) -> bool:
    """Whether an entry is the policy or name that selects its section."""
    return "const" in entry or _names_own(entry)


def _keys(section: Schema, schema: Schema, prefix: str) -> Iterator[str]:
    for name, entry in section["properties"].items():
        if not _is_choice(entry):
            yield _described(f"{prefix}{name}", entry, schema, name in _required(section))


def _described(key: str, entry: Schema, schema: Schema, required: bool) -> str:
    kind = _kind(entry, schema)
    if required:
        kind += ", required"
    elif entry.get("default") is not None:
        kind += f", default: {json.dumps(entry['default'])}"
    text = textwrap.fill(
        _meaning(entry),
        _WIDTH,
        initial_indent="    ",
        subsequent_indent="    ",
    )
    return f"{key}: {kind}\n{text}"


def _meaning(entry: Schema) -> str:
    """An entry's description, and the names of the built-in parts that it may hold."""
    text = " ".join(entry.get("description", "").split())
    lists = [choice.get("items", {}) for choice in _choices(entry)]
    names = next((each["examples"] for each in [entry, *lists] if "examples" in each), None)
    return f"{text} Built in: {', '.join(names)}." if names else text


def _required(section: Schema) -> list[str]:
    return section.get("required", section.get("then", {}).get("required", []))


def _choices(entry: Schema) -> list[Schema]:
    return entry.get("anyOf") or entry.get("oneOf") or [entry]


def _sections(entry: Schema, schema: Schema) -> Iterator[Schema]:
    """The distinct sections that an entry may hold."""
    if "properties" in entry:
        yield entry
        return
    seen: list[Schema] = []
    for choice in _choices(entry):
        if "$ref" in choice:
            candidates = [schema["$defs"][choice["$ref"].rsplit("/", 1)[1]]]
        else:
            candidates = [] if choice is entry else list(_sections(choice, schema))
        for section in candidates:
            if "properties" in section and section not in seen:
                seen.append(section)
                yield section


def _kind(entry: Schema, schema: Schema) -> str:
    if sections := list(_sections(entry, schema)):
        names = [name for name in map(_choice, sections) if name]
        return f"section ({', '.join(names)})" if names else "section"
    if "enum" in entry:
        return " | ".join(map(str, entry["enum"]))
    if "const" in entry:
        return str(entry["const"])
    kinds = []
    for choice in _choices(entry):
        if choice.get("type") == "null" or ("pattern" in choice and choice is not entry):
            continue  # null, or an environment variable
        kinds.append(_kind(choice, schema) if choice is not entry else _plain_kind(entry))
    return " | ".join(dict.fromkeys(kinds))


def _plain_kind(entry: Schema) -> str:
    bounds = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    limits = [f"{sign} {entry[name]}" for name, sign in bounds.items() if name in entry]
    kinds = {"object": "mapping", "array": "list", "string": "text", "boolean": "true | false"}
    name = str(entry.get("type", "value"))
    return " ".join([kinds.get(name, name), ", ".join(limits)]).strip()


def _unknown(part: str, path: list[str], known: list[str]) -> str:
    if not known:
        return f"--explain: {'.'.join(path)} is not a section: it has no keys"
    key = ".".join([*path, part])
    return f"--explain: unknown key {key!r}; {nearest(part, known, 'known keys:')}"
