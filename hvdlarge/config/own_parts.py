"""Parts of the user's own in sections whose built-in parts have typed keys: schedule policies and
optimizers, named `package.module:Class`.

A policy is imported when the job is read, since its fields are the keys of its section. An
optimizer is imported when it is built, so that a plan needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import pydantic
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, TypeAdapter
from pydantic_core import PydanticCustomError, core_schema

from hvdlarge.config import registry
from hvdlarge.config.part_errors import first_line
from hvdlarge.exits import JobError
from hvdlarge.optim.sections import OwnOptimizer
from hvdlarge.schedule.decay import Decay
from hvdlarge.schedule.growth import LARGEST_BATCH, Growth
from hvdlarge.schedule.section import Policy
from hvdlarge.schedule.warmup import Warmup

REFUSED = "own_part_refused"  # the type of pydantic's error for an own policy that cannot be used
# In the locations of pydantic's problems; no key is called so
TAGS = _BUILT_IN, _OWN = ("built-in part", "own part")
_POLICIES = (("batch", "growth"), ("lr", "warmup"), ("lr", "decay"))


def is_own(name: Any) -> bool:
    """Whether a job names a part of the user's own by it.

    >>> is_own("my_parts:Decay"), is_own("cosine")
    (True, False)
    """
    return isinstance(name, str) and ":" in name


def known_keys(path: Sequence[Any], section: Any) -> list[str]:
    """The keys that an own policy or optimizer takes in its section; empty for any other section.

    Args:
        path: of the section in the job file.
        section: as written.
    """
    if not isinstance(section, Mapping):
        return []
    if tuple(path) in _POLICIES and is_own(section.get("policy")):
        fields = dataclasses.fields(registry.load("policy", section["policy"]))
        return list(dict.fromkeys(["policy", *(field.name for field in fields)]))
    own = tuple(path) == ("optimizer",) and is_own(section.get("name"))
    return list(OwnOptimizer.model_fields) if own else []


class _WithOwn:
    """Adds own parts to a union of built-in sections, which `tag`, one of their keys, tells apart.

    The union keeps its form: locations and messages of its problems are those of a union without
    own parts.
    """

    tag = "policy"

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        return core_schema.tagged_union_schema(
            {_BUILT_IN: handler(source), _OWN: self.own_schema(handler)}, self._kind_of
        )

    def __get_pydantic_json_schema__(
        self, schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        entry = dict(handler(schema["choices"][_BUILT_IN]))
        entry["oneOf"] = [*entry["oneOf"], self.own_json_schema(schema, handler)]
        return entry

    def own_schema(self, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """How an own part is read."""
        raise NotImplementedError

    def own_json_schema(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """How it is described in the JSON Schema."""
        raise NotImplementedError

    def _kind_of(self, section: Any) -> str:
        name = (
            section.get(self.tag)
            if isinstance(section, Mapping)
            else getattr(section, self.tag, None)
        )
        return _OWN if is_own(name) else _BUILT_IN


class OwnSection(_WithOwn):
    """Adds one more section, for every name of the form package.module:Class."""

    tag = "name"

    def __init__(self, section: type[pydantic.BaseModel]) -> None:
        self.section = section

    def own_schema(self, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """As the section."""
        return handler.generate_schema(self.section)

    def own_json_schema(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """As the section."""
        return handler(schema["choices"][_OWN])


class OwnPolicy(_WithOwn):
    """Adds the policies below a class of hvdlarge.schedule that are named package.module:Class."""

    def __init__(self, base: type[Policy]) -> None:
        self.base = base

    def own_schema(self, handler: GetCoreSchemaHandler) -> core_schema.CoreSchema:
        """By the fields of the class that the job names."""
        return core_schema.no_info_plain_validator_function(
            self._read,
            serialization=core_schema.plain_serializer_function_ser_schema(
                lambda policy: TypeAdapter(type(policy)).dump_python(policy, mode="json")
            ),
        )

    def own_json_schema(self, schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        """Its policy alone: the schema cannot know the fields of the class."""
        kind = self.base.__name__
        return {
            "description": f"A policy of your own: a frozen dataclass derived from {kind} of "
            f"hvdlarge.schedule.{kind.lower()}.",
            "title": f"Own{kind}",
            "type": "object",
            "properties": {
                "policy": {
                    "type": "string",
                    "pattern": registry.OWN_PATTERN,
                    "description": "A policy of your own; its fields are the section's keys.",
                }
            },
            "required": ["policy"],
        }

    def _read(self, section: Any) -> Policy:
        if isinstance(section, self.base):
            return section
        try:
            kind = own_policy(section["policy"], self.base)
        except JobError as error:
            raise PydanticCustomError(REFUSED, "{message}", {"message": str(error)}) from None
        try:
            # From JSON, as the job itself (job_file.py)
            return TypeAdapter(kind).validate_json(json.dumps(dict(section)), strict=True)
        except pydantic.ValidationError:
            raise
        except Exception as error:
            message = f"{section['policy']}: {first_line(error)}"
            raise PydanticCustomError(REFUSED, "{message}", {"message": message}) from None


def own_policy(name: str, base: type[Policy]) -> Any:
    """The class of an own policy, whose `policy` is its name in the job.

    Args:
        name: package.module:Class.
        base: the class of hvdlarge.schedule below which it must be.

    Raises:
        JobError: if it is not there, or is not a frozen dataclass derived from `base`.
    """
    try:
        kind = registry.load("policy", name)
    except JobError as error:
        raise JobError(str(error).removeprefix("policy: ")) from None
    except Exception as error:
        raise JobError(f"{name} cannot be imported: {first_line(error)}") from None
    where = f"{base.__name__} of {base.__module__}"
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise JobError(f"{name} is not a subclass of {where}")
    settings = vars(kind).get("__dataclass_params__")
    if settings is None or not settings.frozen:
        raise JobError(f"{name} must be a frozen dataclass: decorate it @dataclass(frozen=True)")
    missing = ", ".join(sorted(getattr(kind, "__abstractmethods__", ())))
    if missing:
        raise JobError(f"{name} lacks {missing}, which every subclass of {where} has")
    return _named(cast(Any, kind), name)


@functools.cache
def _named(kind: Any, name: str) -> Any:
    """The same class with the key `policy`, whose one value is `name`."""
    named = dataclasses.make_dataclass(
        kind.__name__,
        [("policy", Literal[name], dataclasses.field(default=name))],
        bases=(kind,),
        frozen=True,
    )
    named.__module__, named.__doc__ = kind.__module__, kind.__doc__
    return named


def policy_problem(policy: Policy, epochs: float, batch: int, batch_factor: float) -> str | None:
    """What an own policy does that no policy may, found by asking it throughout a run; None for a
    sound one, and for a built-in one.

    Args:
        policy: of any kind.
        epochs: length of the run.
        batch: the first global batch, in samples.
        batch_factor: the first k = global batch / base batch.
    """
    if not is_own(policy.policy):
        return None
    try:
        if problem := _words_problem(policy, epochs):
            return problem
        if isinstance(policy, Decay):
            return _decay_problem(policy, epochs)
        if isinstance(policy, Warmup):
            return _warmup_problem(policy, epochs, batch_factor)
        return _growth_problem(policy, epochs, batch) if isinstance(policy, Growth) else None
    except Exception as error:
        return f"{policy.policy}: {first_line(error)}"


_ASKED = 200  # times a run


def _words_problem(policy: Policy, epochs: float) -> str | None:
    for key_and_message in policy.errors(epochs):
        if not (isinstance(key_and_message, tuple) and [*map(type, key_and_message)] == [str, str]):
            return f"errors() gives {key_and_message!r}: it must yield pairs (key, message)"
    for note in policy.notes(epochs):
        if not isinstance(note, str):
            return f"notes() gives {note!r}: it must yield strings"
    return None


def _decay_problem(decay: Decay, epochs: float) -> str | None:
    asked = [epochs * number / _ASKED for number in range(_ASKED)]
    factors = [decay.factor(epoch, 0.0, epochs) for epoch in asked]
    for epoch, factor in zip(asked, factors, strict=True):
        if not (_is_number(factor) and 0 <= factor <= 1):
            return f"the factor is {factor!r} at epoch {epoch:g}: it must be a number from 0 to 1"
        if (again := decay.factor(epoch, 0.0, epochs)) != factor:
            return f"the factor at epoch {epoch:g} is {factor:g}, and {again:g} when asked again"
        if decay.depends_on_length is False and decay.factor(epoch, 0.0, 2 * epochs) != factor:
            return "depends_on_length is False, but in a run of twice the length the factor differs"
    for before, after in itertools.pairwise(range(_ASKED)):
        start, end = asked[before], asked[after]
        if decay.highest_factor(start, end, 0.0, epochs) < max(factors[before], factors[after]):
            return (
                f"the factor rises from epoch {start:g} to {end:g} above what highest_factor gives"
            )
    return None


def _warmup_problem(warmup: Warmup, epochs: float, batch_factor: float) -> str | None:
    if warmup.on_growth not in ("jump", "ramp"):
        return f"on_growth is {warmup.on_growth!r}: it must be jump or ramp"
    for name, length in {
        "length": warmup.length(batch_factor),
        "ramp_length": warmup.ramp_length(epochs / 2, batch_factor, 2 * batch_factor),
    }.items():
        if not (_is_number(length) and length >= 0):
            return f"{name} is {length!r}: it must be a number of epochs, 0 or more"
    if not isinstance(words := warmup.length_as_arithmetic(batch_factor), str):
        return f"length_as_arithmetic is {words!r}: it must be a text"
    return None


def _growth_problem(growth: Growth, epochs: float, batch: int) -> str | None:
    if growth.depends_on_measurement:
        for number in range(_ASKED):  # the batches are known to the run only
            growth.acts_between(epochs * number / _ASKED, epochs * (number + 1) / _ASKED)
        return None
    current = batch
    for epoch in (epochs * number / _ASKED for number in range(_ASKED)):
        answers = [growth.next_batch(batch, current, epoch, {}) for _ in range(2)]
        if type(answers[0]) is not int or not current <= answers[0] <= LARGEST_BATCH:
            return (
                f"the batch is {answers[0]!r} at epoch {epoch:g}: it must be a whole number of "
                f"samples from {current} to {LARGEST_BATCH}"
            )
        if answers[0] != answers[1]:
            return f"the batch at epoch {epoch:g} is {answers[0]}, and {answers[1]} if asked again"
        current = answers[0]
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
