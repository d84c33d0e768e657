"""Base class of the schedule policies, each a section of the job file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar


class Policy:
    """A choice of one section of the job file: a frozen dataclass whose fields are the section's
    keys, `policy` (its name, a `Literal`) the first of them.

    A new one needs a file of its own and a line in config/registry.py.
    From there the job file, the JSON Schema, `--explain` and the documentation know it; whatever
    else is asked of a policy has a method here or in the base class of its kind.
    """

    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "strict": True,
        "use_attribute_docstrings": True,
    }

    if TYPE_CHECKING:
        # A field of each policy; declared here for type checkers only
        @property
        def policy(self) -> str:
            """Its name in the job file."""

    def errors(self, epochs: float) -> Iterator[tuple[str, str]]:
        """Yield (key, message) for each value that is invalid in a run of `epochs` epochs."""
        return iter(())

    def notes(self, epochs: float) -> Iterator[str]:
        """Yield notes on surprising effects in a run of `epochs` epochs; each begins with a key."""
        return iter(())
