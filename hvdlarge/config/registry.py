"""Every part that a job can name: its short name, and where it lives.

User-defined parts are named `package.module:attribute`. Nothing is imported before it is needed,
and a plan (sizes of data sets, sections of optimizers and schedules) needs no torch.
docs/extending.md shows one new part of each kind.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import operator
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from hvdlarge.exits import JobError


class DataSet(NamedTuple):
    """Where a data set lives, and how many training samples it has."""

    target: str
    samples: int | str  # without arguments; or the argument that gives the number


DATA_SETS = {
    "digits": DataSet("hvdlarge.data.digits:digits", samples=1437),
    "synthetic_images": DataSet("hvdlarge.data.synthetic:synthetic_images", samples="samples"),
}
MODELS = {
    "convnet": "hvdlarge.models.convnet:ConvNet",
    "mlp": "hvdlarge.models.mlp:MLP",
    "resnet20": "hvdlarge.models.resnet:ResNet20",
    "resnet50": "hvdlarge.models.resnet:ResNet50",
    "row_lstm": "hvdlarge.models.row_lstm:RowLSTM",
}
LOSSES = {
    "cross_entropy": "torch.nn:CrossEntropyLoss",
    "mse": "torch.nn:MSELoss",
}
METRICS = {
    "accuracy": "hvdlarge.evaluation.accuracy:Accuracy",
}
# Sections of the job file, importable without torch; each names itself as here.
OPTIMIZERS = {
    "lars": "hvdlarge.optim.sections:Lars",
    "lamb": "hvdlarge.optim.sections:Lamb",
    "sgd": "hvdlarge.optim.sections:Sgd",
    "adam": "hvdlarge.optim.sections:Adam",
    "adamw": "hvdlarge.optim.sections:AdamW",
    "adagrad": "hvdlarge.optim.sections:Adagrad",
    "rmsprop": "hvdlarge.optim.sections:RmsProp",
}
GROWTHS = {
    "none": "hvdlarge.schedule.growth:NoGrowth",
    "adabatch": "hvdlarge.schedule.growth:AdaBatchGrowth",
}
WARMUPS = {
    "none": "hvdlarge.schedule.warmup:NoWarmup",
    "linear": "hvdlarge.schedule.warmup:LinearWarmup",
    "legw": "hvdlarge.schedule.warmup:LegwWarmup",
}
DECAYS = {
    "constant": "hvdlarge.schedule.decay:ConstantDecay",
    "multistep": "hvdlarge.schedule.decay:MultistepDecay",
    "exponential": "hvdlarge.schedule.decay:ExponentialDecay",
    "polynomial": "hvdlarge.schedule.decay:PolynomialDecay",
    "cosine": "hvdlarge.schedule.decay:CosineDecay",
    "one_cycle": "hvdlarge.schedule.decay:OneCycle",
}

Registry = Mapping[str, str] | Mapping[str, DataSet]
OWN_PATTERN = r"^[^:]+:[^:]+$"  # package.module:attribute
_job_folders: list[str] = []


def training_samples(name: str, arguments: Mapping[str, Any]) -> int | None:
    """Samples of a built-in data set's training set; None for any other, or wrong arguments.

    >>> training_samples("digits", {})
    1437
    >>> training_samples("synthetic_images", {"samples": 700})
    700
    """
    if name not in DATA_SETS:
        return None
    samples = DATA_SETS[name].samples
    if isinstance(samples, int):
        return None if arguments else samples
    given = arguments.get(samples)
    return given if type(given) is int else None


def union(registry: Mapping[str, str]) -> Any:
    """The type of a section of the job file that is one of a registry's, as `A | B | …`."""
    return functools.reduce(operator.or_, (find(name, name, registry) for name in registry))


def instantiate(key: str, name: str, arguments: Mapping[str, Any], registry: Registry) -> Any:
    """Call the part that a job names, and return what it returns.

    Args:
        key: the job key that holds the name, for messages.
        name: a short name of `registry`, or package.module:attribute, which is looked for in the
            current folder and beside the job file too.
        arguments: keyword arguments; compared with the part's signature before it is called.
        registry: the built-in parts of this kind.

    Raises:
        JobError: for an unknown name, a module or attribute that does not exist, or arguments that
            do not fit.
    """
    part = find(key, name, registry)
    try:
        inspect.signature(part).bind(**arguments)
    except TypeError as error:
        # Not their values, which may be secrets and cannot be what is wrong
        given = ", ".join(arguments) or "none"
        raise JobError(
            f"{key}: the arguments ({given}) do not fit {name}{inspect.signature(part)}: {error}"
        ) from None
    except ValueError:  # a callable without a signature reports itself what it does not accept
        pass
    try:
        return part(**arguments)
    except ValueError as error:
        if name in registry:  # the traceback of an own part says more to its owner
            raise JobError(f"{key}: {name}: {error}") from None
        raise


def look_beside(job_files: Iterable[str]) -> None:
    """Look for modules of own parts in the folders of these files too, after the current one."""
    _job_folders[:] = dict.fromkeys(os.path.dirname(os.path.abspath(file)) for file in job_files)


def find(key: str, name: str, registry: Registry) -> Any:
    """The part that a job names, imported; the arguments are those of `instantiate`.

    Raises:
        JobError: for an unknown name, or a module or attribute that does not exist.
    """
    if ":" not in name and name not in registry:
        raise JobError(
            f"{key}: unknown name {name!r}; {_suggestion(name, registry)} An own one is written "
            "package.module:attribute"
        )
    entry = registry.get(name, name)
    target = entry.target if isinstance(entry, DataSet) else entry
    module_name, _, attribute = target.partition(":")
    if not (module_name and attribute and all(module_name.split("."))):
        raise JobError(f"{key}: {name!r} is not of the form package.module:attribute")
    if name not in registry:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())  # `python -m` does this, a console script does not
        for folder in reversed(_job_folders):
            if folder not in sys.path:
                sys.path.insert(sys.path.index(os.getcwd()) + 1, folder)
    try:
        part: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (
            module_name == error.name or module_name.startswith(error.name + ".")
        ):
            raise JobError(
                f"{key}: there is no module {error.name!r} for {name!r} (looked in "
                f"{' and '.join(dict.fromkeys([os.getcwd(), *_job_folders]))} too)"
            ) from None
        raise
    for step in attribute.split("."):
        try:
            part = getattr(part, step)
        except AttributeError:
            raise JobError(f"{key}: the module {module_name!r} has no {attribute!r}") from None
    if not callable(part):
        raise JobError(f"{key}: {name} is not callable, it is a {type(part).__name__}")
    return part


def _suggestion(name: str, registry: Registry) -> str:
    close = difflib.get_close_matches(name, registry, n=1)
    return (
        f"did you mean {close[0]!r}?" if close else f"built in are {', '.join(sorted(registry))}."
    )
