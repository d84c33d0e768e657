"""How pydantic reads a policy as a section of the job file: strictly, its docstrings as manual."""

from __future__ import annotations

from typing import Any

SECTION: dict[str, Any] = {"extra": "forbid", "strict": True, "use_attribute_docstrings": True}
