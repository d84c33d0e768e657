"""From a name in the job file to the object it names: a built-in's short name, or an own
`package.module:attribute`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from typing import Any

from hvdlarge.exits import JobError

# Every short name that a job may use, and where it lives.
DATA = {
    "digits": "hvdlarge.data.digits:digits",
    "synthetic_images": "hvdlarge.data.synthetic:synthetic_images",
}
MODELS = {
    "convnet": "hvdlarge.models.convnet:ConvNet",
    "mlp": "hvdlarge.models.mlp:MLP",
    "resnet20": "hvdlarge.models.resnet:ResNet20",
    "resnet50": "hvdlarge.models.resnet:ResNet50",
    "row_lstm": "hvdlarge.models.row_lstm:RowLSTM",
}
LOSSES = {"cross_entropy": "torch.nn:CrossEntropyLoss", "mse": "torch.nn:MSELoss"}


def build(key: str, name: str, arguments: dict[str, Any], built_in: dict[str, str]) -> Any:
    """What the object called `name` returns for `arguments`.

    Args:
        key: the job key that holds the name, for messages.
        name: a key of `built_in`, or package.module:attribute, looked for in the current folder
            too.
        arguments: keyword arguments, held against the object's signature before it is called.
        built_in: short names.

    Raises:
        JobError: for an unknown name, a module or attribute that is not there, or arguments that do
            not fit.
    """
    target = _find(key, name, built_in)
    try:
        inspect.signature(target).bind(**arguments)
    except TypeError as error:
        # Not their values, which may be secrets and cannot be what is wrong
        given = ", ".join(arguments) or "none"
        raise JobError(
            f"{key}: the arguments ({given}) do not fit {name}{inspect.signature(target)}: {error}"
        ) from None
    except ValueError:  # a callable without a signature; it will say itself what it does not accept
        pass
    try:
        return target(**arguments)
    except ValueError as error:
        if name in built_in:  # an own object's traceback says more to its owner
            raise JobError(f"{key}: {name}: {error}") from None
        raise


def _find(key: str, name: str, built_in: dict[str, str]) -> Any:
    if ":" not in name and name not in built_in:
        close = difflib.get_close_matches(name, built_in, n=1)
        hint = (
            f"did you mean {close[0]!r}?"
            if close
            else f"built in are {', '.join(sorted(built_in))}."
        )
        raise JobError(
            f"{key}: unknown name {name!r}; {hint} An own one is written package.module:attribute"
        )
    module_name, _, attribute = built_in.get(name, name).partition(":")
    if not (module_name and attribute and all(module_name.split("."))):
        raise JobError(f"{key}: {name!r} is not of the form package.module:attribute")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # `python -m` does this, a console script does not
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (
            module_name == error.name or module_name.startswith(error.name + ".")
        ):
            raise JobError(
                f"{key}: there is no module {error.name!r} for {name!r} (looked in {os.getcwd()} "
                "too)"
            ) from None
        raise
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise JobError(f"{key}: the module {module_name!r} has no {attribute!r}") from None
    if not callable(found):
        raise JobError(f"{key}: {name} is not callable, it is a {type(found).__name__}")
    return found
