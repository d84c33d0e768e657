"""Reads a job from its file, the files it extends, environment variables and the command line.

All problems are reported at once, each with its place (file and line, or the command line), the key
as written, the value, the rule and the nearest known key.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from hvdlarge.config import own_parts, registry, yaml_source
from hvdlarge.config.job import Job
from hvdlarge.config.nearest import nearest
from hvdlarge.config.validation import cross_field_errors
from hvdlarge.exits import JobError
from hvdlarge.optim.presets import PRESETS

_EXTENDS = "extends"
# The keys that select what a section configures. If an extending file changes one, the keys of the
# section it extends do not apply.
_SELECTORS = ("policy", "name")
_DEFAULT_NAMES = {("optimizer",): "lars", ("loss",): "cross_entropy"}
_SHORT_FORMS = {("init_from",): "path"}  # sections that may be given as the text of one key


class Place(NamedTuple):
    """Where a key was written."""

    file: str
    line: int | None = None
    variable: str | None = None  # the original text, if variables were replaced in it

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


_COMMAND_LINE = Place("command line")


class Written(NamedTuple):
    """Values before validation, and where they were written."""

    values: dict[str, Any]
    places: dict[yaml_source.Path, Place]

    def place(self, path: yaml_source.Path) -> Place:
        """The place of the longest prefix of `path` that was written."""
        while path not in self.places:
            path = path[:-1]
        return self.places[path]


def read_job(
    path: str, overrides: Sequence[str] = (), objects: Mapping[str, str] | None = None
) -> Job:
    """Read and validate a job; its own parts are looked for beside its file from then on.

    Args:
        path: of the YAML file.
        overrides: `key.sub=value`, from the command line.
        objects: sections (`data`, `model`, `loss`) whose part is given as an object, with a name
            for it; the other keys of these sections stay, except the part's own arguments.

    Raises:
        JobError: with one message that lists every problem with its place.
    """
    return _validated(_read_file(path, ()), overrides, objects or {})


def job_path(name: str) -> str:
    """The path of a job: `name` itself, or the shipped job of that name, such as `digits`."""
    if not _is_bare(name) or Path(name).exists():
        return name
    return str(shipped_jobs().get(name, name))


def shipped_jobs() -> dict[str, Path]:
    """Paths of the jobs that come with the package, by name, in the checkout or as installed."""
    checkout = Path(__file__).parents[2] / "jobs"
    installed = Path(sysconfig.get_path("data")) / "share" / "hvdlarge" / "jobs"
    folder = checkout if (checkout / "job.schema.json").is_file() else installed
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _is_bare(name: str) -> bool:
    return Path(name).name == name and not Path(name).suffix


def parse_job(
    text: bytes | str,
    path: str,
    overrides: Sequence[str] = (),
    objects: Mapping[str, str] | None = None,
) -> Job:
    """Validate a job from YAML text.

    Args:
        text: the YAML document.
        path: for messages, and for relative paths in `extends`.
        overrides: `key.sub=value`.
        objects: see `read_job`.

    Raises:
        JobError: see `read_job`.
    """
    return _validated(_read_text(text, path, ()), overrides, objects or {})


def _read_file(path: str, extended_by: tuple[Place, ...]) -> Written:
    what = "job file" if not extended_by else "file to extend"
    where = f"{extended_by[-1]}: extends: " if extended_by else ""
    try:
        with Path(path).open("rb") as file:
            text = file.read(yaml_source.MAX_BYTES + 1)  # one byte too long is enough for an error
    except FileNotFoundError:
        hint = ""
        if not extended_by and _is_bare(path):
            hint = f"; shipped jobs are {', '.join(shipped_jobs())}"
        raise JobError(f"{where}{path}: no such {what} (looked in {Path.cwd()}){hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise JobError(
            f"{where}{path}: the {what} cannot be read: {getattr(error, 'strerror', error)}"
        ) from None
    return _read_text(text, path, extended_by)


def _read_text(text: bytes | str, path: str, extended_by: tuple[Place, ...]) -> Written:
    try:
        source = yaml_source.read(text, os.environ)
    except yaml_source.SourceError as error:
        raise JobError(f"{Place(path, error.line)}: {error}") from None
    if source.values is None:
        raise JobError(
            f"{path}: the job file is empty; the smallest job has name, epochs, data, model, batch "
            "and lr"
        )
    if not isinstance(source.values, dict):
        raise JobError(
            f"{path}: a job file is a mapping of keys to values (`key: value`), not a "
            f"{type(source.values).__name__}"
        )
    places = {(): Place(path)} | {
        key: Place(path, line, source.variables.get(key)) for key, line in source.lines.items()
    }
    written = Written(source.values, places)
    if _EXTENDS not in written.values:
        return written
    other, place = written.values.pop(_EXTENDS), places.pop((_EXTENDS,))
    if not isinstance(other, str):
        raise JobError(f"{place}: extends is {_show(other)}: it must name another job file")
    chain = (*extended_by, place)
    file = str(Path(path).parent / other)
    if any(_same_file(file, previous.file) for previous in chain):
        cycle = " → ".join([*(previous.file for previous in chain), file])
        raise JobError(f"{place}: extends: {cycle} is circular")
    base = _read_file(file, chain)
    places = dict(base.places)
    _extend(base.values, written.values, (), places, written.places)
    return Written(base.values, places | {(): Place(path)})


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return one == other


def _extend(
    base: dict[str, Any],
    own: Mapping[str, Any],
    path: yaml_source.Path,
    places: dict[yaml_source.Path, Place],
    own_places: Mapping[yaml_source.Path, Place],
) -> None:
    """Merge `own` into `base` section by section; other values, lists, and sections that select
    another policy or name are replaced as a whole.
    """
    for key, value in own.items():
        key_path, base_value = (*path, key), base.get(key)
        places[key_path] = own_places[key_path]
        if (
            isinstance(value, dict)
            and isinstance(base_value, dict)
            and not _selects_another(base_value, value, key_path)
        ):
            _extend(base_value, value, key_path, places, own_places)
            continue
        for other in [other for other in places if _is_in(other, key_path)]:
            del places[other]
        places |= {other: place for other, place in own_places.items() if _is_in(other, key_path)}
        base[key] = value


def _is_in(path: yaml_source.Path, section: yaml_source.Path) -> bool:
    return path[: len(section)] == section


def _selects_another(
    base: Mapping[str, Any], own: Mapping[str, Any], path: yaml_source.Path
) -> bool:
    if not path or "args" in path:  # not the name of the job, nor an argument called so
        return False
    default = {"name": _DEFAULT_NAMES[path]} if path in _DEFAULT_NAMES else {}
    base = {**default, **base}
    return any(key in own and key in base and own[key] != base[key] for key in _SELECTORS)


def _name_object(written: Written, section: str, name: str) -> None:
    """Put the name of an object in the place of the part that a section names."""
    keys = written.values.setdefault(section, {})
    if not isinstance(keys, dict):
        return  # refused with its type
    for key in ("name", "args", "label_smoothing"):
        keys.pop(key, None)
        for other in [other for other in written.places if _is_in(other, (section, key))]:
            del written.places[other]
    keys["name"] = name
    written.places[(section, "name")] = _COMMAND_LINE


def _validated(written: Written, overrides: Sequence[str], objects: Mapping[str, str]) -> Job:
    path = written.places[()].file
    for file in reversed(dict.fromkeys(place.file for place in written.places.values())):
        registry.look_beside(file)
    for section, name in objects.items():
        _name_object(written, section, name)
    for override in overrides:
        _override(written, override)
    optimizer = written.values.get("optimizer")
    if isinstance(optimizer, dict):
        optimizer.setdefault("name", "lars")
        preset = optimizer.get("preset", "paper")
        if optimizer["name"] == "lars" and isinstance(preset, str):
            written.values["optimizer"] = {**PRESETS.get(preset, {}), **optimizer}
    try:
        # From JSON, since strict mode then accepts a list for a tuple and a mapping for a section,
        # but not "3" for a number.
        job = Job.model_validate_json(json.dumps(written.values), strict=True)
    except ValidationError as error:
        raise _job_error(
            path, [_describe(problem, written) for problem in error.errors(include_url=False)]
        ) from None
    problems = [
        f"  {written.place(key)}: {'.'.join(map(str, key))}: {message}"
        for key, message in cross_field_errors(job)
    ]
    if problems:
        raise _job_error(path, problems)
    variables = {
        key: place.variable for key, place in written.places.items() if place.variable is not None
    }
    return job.keeping_variables(variables)


def _job_error(path: str, problems: Sequence[str]) -> JobError:
    heading = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return JobError("\n".join([f"{path}: {heading} in the job file", *problems]))


def _override(written: Written, override: str) -> None:
    key, equals, value = override.partition("=")
    parts = tuple(key.split("."))
    if not equals or not all(parts):
        raise JobError(f"command line: {override!r} is not of the form key.sub=value")
    try:
        source = yaml_source.read(value, os.environ)
    except yaml_source.SourceError as error:
        raise JobError(f"command line: {override!r}: {error}") from None
    section = written.values
    for number, part in enumerate(parts[:-1]):
        path, below = parts[: number + 1], section.get(part)
        if isinstance(below, str) and path in _SHORT_FORMS:
            below = {_SHORT_FORMS[path]: below}
        elif below is None:
            below = {}
        if not isinstance(below, dict):
            raise JobError(f"command line: {override!r}: {'.'.join(path)} is not a section")
        section[part] = below
        section = below
    if _selects_another(section, {parts[-1]: source.values}, parts[:-1]):
        _keep_from_command_line(written, section, parts[:-1])
    section[parts[-1]] = source.values
    for other in [other for other in written.places if _is_in(other, parts)]:
        del written.places[other]
    written.places[parts] = _COMMAND_LINE
    written.places.update(
        {
            (*parts, *path): _COMMAND_LINE._replace(variable=text)
            for path, text in source.variables.items()
        }
    )


def _keep_from_command_line(
    written: Written, section: dict[str, Any], path: yaml_source.Path
) -> None:
    """Remove the keys of a section that were not given on the command line."""
    for key in list(section):
        if written.place((*path, key)).file != _COMMAND_LINE.file:
            del section[key]
            for other in [other for other in written.places if _is_in(other, (*path, key))]:
                del written.places[other]


# --- error messages


def _describe(problem: Any, written: Written) -> str:
    location = tuple(part for part in problem["loc"] if part not in own_parts.TAGS)
    keys = _as_written(location, written.values)
    name, place = ".".join(map(str, keys)), written.place(keys)
    kind, value = problem["type"], problem["input"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        section = keys[:-1]
        known = own_parts.known_keys(section, _value_at(section, written.values))
        known = known or _known_keys(location)
        return f"  {place}: unknown key {name!r}{_nearest(str(keys[-1]), known)}"
    if kind == own_parts.REFUSED:
        return f"  {written.place((*keys, 'policy'))}: {name}.policy: {problem['msg']}"
    if kind == "missing":
        return f"  {place}: the key {name!r} is missing"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        known, tag = _known_policies(location), problem["ctx"]["discriminator"].strip("'")
        if kind == "union_tag_not_found":
            return (
                f"  {place}: the key {f'{name}.{tag}'!r} is missing; it is one of "
                f"{', '.join(known)}"
            )
        return (
            f"  {written.place((*keys, tag))}: {name}.{tag} is "
            f"{problem['ctx']['tag']!r}{_nearest(problem['ctx']['tag'], known)}"
        )
    if kind in ("model_type", "dataclass_type", "model_attributes_type", "dict_type"):
        known, policies = _known_keys((*location, "")), _known_policies(location)
        hint = f" with the keys {', '.join(known)}" if known else ""
        hint = f" with a policy or name, one of {', '.join(policies)}" if policies else hint
        return f"  {place}: {name} is {_show(value)}: it must be a section{hint}"
    if kind == "string_pattern_mismatch" and problem["ctx"]["pattern"] == registry.OWN_PATTERN:
        return f"  {place}: {name} is {_show(value)}: it is written package.module:attribute"
    message = problem["msg"].removeprefix("Value error, ")
    if isinstance(value, (dict, list)) and kind == "value_error":
        return f"  {place}: {name}: {message}"
    return (
        f"  {place}: {name} is {_show(value)}: "
        f"{message[0].lower()}{message[1:]}{_hint(kind, value)}"
    )


def _hint(kind: str, value: Any) -> str:
    """A suggestion for a value of the wrong type."""
    if (
        kind == "bool_type"
        and isinstance(value, str)
        and value.lower() in ("yes", "on", "y", "no", "off", "n")
    ):
        return (
            f"; write {'true' if value.lower() in ('yes', 'on', 'y') else 'false'} (in YAML 1.2 "
            f"{value!r} is a string)"
        )
    if kind in ("int_type", "float_type") and isinstance(value, str):
        plain = value.replace("_", "").replace(",", "")
        try:
            float(plain)
        except ValueError:
            return (
                "; the unit is in the key's name, write the number alone"
                if value[:1].isdigit()
                else ""
            )
        return f"; write {plain}, without quotes"
    if kind == "string_type" and isinstance(value, (int, float)):
        return "; put it in quotes"
    return ""


def _show(value: Any) -> str:
    text = (
        "nan"
        if isinstance(value, float) and math.isnan(value)
        else json.dumps(value, ensure_ascii=False)
    )
    return text if len(text) <= 80 else text[:77] + "…"


def _nearest(word: str, known: Sequence[str]) -> str:
    suggestion = nearest(word, sorted(known))
    return f"; {suggestion}" if suggestion else ""


def _as_written(location: Sequence[str | int], values: Any) -> yaml_source.Path:
    """The path of a problem in the YAML: pydantic's location without the tags of unions."""
    path: list[str | int] = []
    for number, part in enumerate(location):
        is_last = number == len(location) - 1
        if isinstance(values, list) and isinstance(part, int):
            path.append(part)
            values = values[part] if part < len(values) else None
        elif isinstance(values, dict) and part in values:
            path.append(part)
            values = values[part]
        elif (
            isinstance(values, dict)
            and is_last
            and part not in (values.get("policy"), values.get("name"))
        ):
            path.append(part)  # a key that is missing
    return tuple(path)


def _value_at(path: yaml_source.Path, values: Any) -> Any:
    for part in path:
        values = values[part]
    return values


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """The keys of the section that contains `location`."""
    return list(_schema_of(location[:-1]).get("properties", {}))


def _known_policies(location: Sequence[str | int]) -> list[str]:
    """The policies or names that the section at `location` may select."""
    return list(_schema_of(location).get("discriminator", {}).get("mapping", {}))


def _schema_of(location: Sequence[str | int]) -> dict[str, Any]:
    """The part of the job file's JSON Schema for the section at pydantic's `location`."""
    schema = _schema()
    node: dict[str, Any] = schema
    for part in location:
        properties, mapping = (
            node.get("properties", {}),
            node.get("discriminator", {}).get("mapping", {}),
        )
        node = (
            node.get("items", {})
            if isinstance(part, int)
            else properties.get(part) or ({"$ref": mapping[part]} if part in mapping else {})
        )
        # A section that may be left out, or given as a text
        node = next((choice for choice in node.get("anyOf", []) if "$ref" in choice), node)
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return node


@functools.cache
def _schema() -> dict[str, Any]:
    return Job.model_json_schema()
