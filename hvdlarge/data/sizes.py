"""How many training samples the built-in data sets have, for a plan. A test holds this
against the data.

Contract: pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def training_samples(name: str, arguments: Mapping[str, Any]) -> int | None:
    """Samples of a built-in data set's training set; None for any other, or wrong arguments.

    >>> training_samples("digits", {})
    1437
    """
    if name == "digits" and not arguments:
        return 1437
    if name == "synthetic_images" and type(arguments.get("samples")) is int:
        return arguments["samples"]
    return None
