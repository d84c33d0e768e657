"""The JSON Schema of the job file, for completion and validation in editors.

jobs/job.schema.json is generated from it, and a test compares the two. A job file refers to it in
its first line: `# yaml-language-server: $schema=job.schema.json`.
"""

from __future__ import annotations

from typing import Any

from hvdlarge.config.job import Job

_VARIABLE = {"type": "string", "pattern": r"\$\{", "description": "filled in from the environment"}


def job_schema() -> dict[str, Any]:
    """The schema of the job file, JSON Schema 2020-12."""
    schema = Job.model_json_schema()
    _name_own_sections(schema)
    for definition in [schema, *schema["$defs"].values()]:
        definition.pop("title", None)
        for name, entry in definition.get("properties", {}).items():
            if isinstance(entry.get("default"), dict):  # given at the keys of the section
                del entry["default"]
            entry.pop("title", None)
            definition["properties"][name] = _with_variables(entry)
    schema["properties"]["extends"] = {
        "type": "string",
        "description": "Path of a job file to inherit from; keys in this file override its keys.",
    }
    if "Lars" in schema["$defs"]:
        optimizer = schema["properties"]["optimizer"]
        schema["properties"]["optimizer"] = {
            "anyOf": [optimizer, {"$ref": "#/$defs/Lars"}],
            "description": optimizer.pop("description"),
        }
    # A file that extends another one may leave the required keys to it.
    required = schema.pop("required")
    schema["if"] = {"not": {"required": ["extends"]}}
    schema["then"] = {"required": required}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "hvdlarge job",
        **schema,
    }


def _name_own_sections(schema: dict[str, Any]) -> None:
    """Move the sections of own parts (own_parts.py) to the other sections."""
    for definition in [schema, *schema["$defs"].values()]:
        for entry in definition["properties"].values():
            for number, choice in enumerate(entry.get("oneOf", [])):
                if "properties" in choice:
                    schema["$defs"][choice["title"]] = choice
                    entry["oneOf"][number] = {"$ref": f"#/$defs/{choice['title']}"}


def _with_variables(entry: dict[str, Any]) -> dict[str, Any]:
    """Allow `${NAME}` as the value of an entry for numbers or booleans."""
    if entry.get("type") in ("integer", "number", "boolean") or any(
        kind.get("type") in ("integer", "number", "boolean") for kind in entry.get("anyOf", [])
    ):
        outside = {
            name: value
            for name, value in entry.items()
            if name in ("default", "title", "description")
        }
        inside = {name: value for name, value in entry.items() if name not in outside}
        return {"anyOf": [inside, _VARIABLE], **outside}
    return entry
