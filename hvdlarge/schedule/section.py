"""What every policy of the job file has: how pydantic reads it as a section, and what it says of a
run beside its formula.
"""

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
        """Each key whose value cannot be meant in a run of `epochs` epochs, and what is wrong with
        it.
        """
        return iter(())

    def notes(self, epochs: float) -> Iterator[str]:
        """What a user may not expect of this policy in a run of `epochs` epochs; each note begins
        with a key.
        """
        return iter(())
