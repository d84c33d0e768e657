"""Every part that a job can name: its short name, and where it lives.

User-defined parts are named `package.module:attribute`. Nothing is imported before it is needed,
and a plan (sizes of data sets, sections of optimizers and schedules) needs no torch.
docs/extending.md shows one new part of each kind.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import os
import sys
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from hvdlarge.config.nearest import nearest
from hvdlarge.config.part_errors import describe
from hvdlarge.exits import JobError, RunExit, is_out_of_memory


class DataSet(NamedTuple):
    """Where a data set lives, and how many training samples it has."""

    target: str
    # Without arguments; or the argument that gives the number; or the package.module:function that
    # gives it for any arguments, or None, and needs no torch; None: unknown
    samples: int | str | None
    default: int | None = None  # of that argument


DATA_SETS = {
    "cifar10": DataSet("hvdlarge.data.cifar:cifar10", samples="samples", default=50_000),
    "cifar100": DataSet("hvdlarge.data.cifar:cifar100", samples="samples", default=50_000),
    "digits": DataSet("hvdlarge.data.digits:digits", samples=1437),
    "glyphs": DataSet("hvdlarge.data.glyphs:glyphs", samples="samples", default=60_000),
    "image_folder": DataSet("hvdlarge.data.image_folder:image_folder", samples=None),
    "mnist": DataSet("hvdlarge.data.mnist:mnist", samples="samples", default=60_000),
    "npy": DataSet("hvdlarge.data.npy:npy", samples=None),
    "parallel_text": DataSet(
        "hvdlarge.data.translation:parallel_text", "hvdlarge.data.text_sizes:parallel_text_pairs"
    ),
    "pydoc_phrases": DataSet(
        "hvdlarge.data.translation:pydoc_phrases", "hvdlarge.data.text_sizes:pydoc_phrase_pairs"
    ),
    "pydoc_text": DataSet(
        "hvdlarge.data.language_models:pydoc_text", "hvdlarge.data.text_sizes:pydoc_windows"
    ),
    "synthetic_images": DataSet("hvdlarge.data.synthetic:synthetic_images", samples="samples"),
    "text_files": DataSet(
        "hvdlarge.data.language_models:text_files", "hvdlarge.data.text_sizes:text_file_windows"
    ),
}
MODELS = {
    "alexnet": "hvdlarge.models.alexnet:AlexNet",
    "alexnet_bn": "hvdlarge.models.alexnet:AlexNetBN",
    "convnet": "hvdlarge.models.convnet:ConvNet",
    "gnmt": "hvdlarge.models.gnmt:GNMT",
    "lenet": "hvdlarge.models.lenet:LeNet",
    "lstm_lm": "hvdlarge.models.lstm_lm:LSTMLanguageModel",
    "mlp": "hvdlarge.models.mlp:MLP",
    "resnet20": "hvdlarge.models.resnet:ResNet20",
    "resnet50": "hvdlarge.models.resnet:ResNet50",
    "row_lstm": "hvdlarge.models.row_lstm:RowLSTM",
    "vgg19_bn": "hvdlarge.models.vgg:VGG19BN",
}
LOSSES = {
    "cross_entropy": "hvdlarge.models.losses:CrossEntropyLoss",
    "from_model": "hvdlarge.models.losses:FromModel",
    "mse": "torch.nn:MSELoss",
}
METRICS = {
    "accuracy": "hvdlarge.evaluation.accuracy:Accuracy",
    "top5": "hvdlarge.evaluation.accuracy:Top5",
    "f1": "hvdlarge.evaluation.accuracy:F1",
    "perplexity": "hvdlarge.evaluation.errors:Perplexity",
    "bleu": "hvdlarge.evaluation.bleu:Bleu",
    "bleu_teacher_forced": "hvdlarge.evaluation.bleu:TeacherForcedBleu",
    "mse": "hvdlarge.evaluation.errors:MeanSquaredError",
    "mae": "hvdlarge.evaluation.errors:MeanAbsoluteError",
}
# Sections of the job file, importable without torch; each names itself as here.
TRANSFORMS = {
    "random_crop": "hvdlarge.data.transform_sections:RandomCrop",
    "random_flip": "hvdlarge.data.transform_sections:RandomFlip",
    "random_resized_crop": "hvdlarge.data.transform_sections:RandomResizedCrop",
    "normalize": "hvdlarge.data.transform_sections:Normalize",
    "mixup": "hvdlarge.data.transform_sections:Mixup",
}
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
    "noise_scale": "hvdlarge.schedule.noise_growth:NoiseScaleGrowth",
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
SINKS = {
    "jsonl": "hvdlarge.telemetry.sinks:JsonlFiles",
    "mlflow": "hvdlarge.telemetry.mlflow:MlflowSink",
    "mlperf": "hvdlarge.telemetry.mlperf:MlperfLog",
    "tensorboard": "hvdlarge.telemetry.tensorboard:TensorBoard",
    "wandb": "hvdlarge.telemetry.wandb:WandbSink",
}

_EXTRAS = {
    "sacrebleu": "bleu",
    "torchmetrics": "metrics",
}  # extras of hvdlarge that packages come with

Registry = Mapping[str, str] | Mapping[str, DataSet]
OWN_PATTERN = r"^[^:]+:[^:]+$"  # package.module:attribute

_JOB_FOLDERS: list[str] = []  # where own parts are looked for after the current folder
_ADDED: set[str] = set()  # those that were not on sys.path


def training_samples(name: str, arguments: Mapping[str, Any]) -> int | None:
    """Samples of a built-in data set's training set; None for any other, or wrong arguments.

    >>> training_samples("digits", {})
    1437
    >>> training_samples("synthetic_images", {"samples": 700})
    700
    >>> training_samples("mnist", {"folder": "data/fashion"})
    60000
    """
    if name not in DATA_SETS:
        return None
    samples = DATA_SETS[name].samples
    if isinstance(samples, int):
        return None if arguments else samples
    if samples is None:
        return None
    if ":" in samples:
        count = load("data.name", samples, {samples: samples})
        try:
            return count(**arguments)
        except (ValueError, TypeError, ModuleNotFoundError):  # reported when the set is built
            return None
    given = arguments.get(samples, DATA_SETS[name].default)
    return given if type(given) is int else None


def look_beside(job_file: str) -> None:
    """Look for own parts also in the folder of a job file, after the current folder and before the
    folders of jobs that were read earlier.
    """
    folder = str(Path(job_file).absolute().parent)
    _JOB_FOLDERS[:] = [folder, *(other for other in _JOB_FOLDERS if other != folder)]


def union(registry: Mapping[str, str]) -> Any:
    """The type of a section of the job file that is one of a registry's, as `A | B | …`."""
    return functools.reduce(operator.or_, (load(name, name, registry) for name in registry))


def instantiate(key: str, name: str, arguments: Mapping[str, Any], registry: Registry) -> Any:
    """Call the part that a job names, and return what it returns.

    Args:
        key: the job key that holds the name, for messages.
        name: a short name of `registry`, or package.module:attribute, which is looked for in the
            current folder and beside the job file too.
        arguments: keyword arguments; compared with the part's signature before it is called.
        registry: the built-in parts of this kind.

    Raises:
        JobError: for an unknown name, a module or attribute that does not exist, arguments that do
            not fit, or an own part that raises, with its line.
    """
    part = load_fitting(key, name, arguments, registry)
    return _call(key, name, part, arguments, registry)


def load_fitting(key: str, name: str, arguments: Mapping[str, Any], registry: Registry) -> Any:
    """The callable that a job names, after its signature was compared with the arguments; it is not
    called. The arguments are those of `instantiate`.

    Raises:
        JobError: for an unknown name, a module or attribute that does not exist, or arguments that
            do not fit.
    """
    part = load(key, name, registry)
    if problem := _misfit(part, arguments):
        raise JobError(f"{key}: {_given(arguments)} do not fit {name}{problem}")
    return part


def instantiate_loss(key: str, name: str, arguments: Mapping[str, Any]) -> Any:
    """The loss that a job names, a callable of (outputs, targets).

    Args:
        key: the job key that holds the name, for messages.
        name: of a class or factory, which is called with the arguments; of a function of (outputs,
            targets, **arguments); or of a callable object.
        arguments: keyword arguments.

    Raises:
        JobError: as `instantiate`; and for a factory that returns nothing callable.
    """
    part = load(key, name, LOSSES)
    if not (inspect.isclass(part) or inspect.isroutine(part)):  # an object is a loss as it is
        if arguments:
            raise JobError(f"{key}: {name} is an object, which takes no arguments")
        return part
    problem = _misfit(part, arguments)
    if inspect.isroutine(part) and problem and not _misfit(part, arguments, positional=2):
        return functools.partial(part, **arguments)
    if problem:
        raise JobError(
            f"{key}: {_given(arguments)} fit {name} neither as a factory of a loss nor as a "
            f"function of (outputs, targets): {name}{problem}"
        )
    loss = _call(key, name, part, arguments, LOSSES)
    if not callable(loss):
        raise JobError(
            f"{key}: {name}({', '.join(arguments)}) must return a loss, a callable of (outputs, "
            f"targets), not a {type(loss).__name__}"
        )
    return loss


def _given(arguments: Mapping[str, Any]) -> str:
    # Not their values, which may be secrets and cannot be what is wrong
    return f"the arguments ({', '.join(arguments) or 'none'})"


def _misfit(part: Any, arguments: Mapping[str, Any], positional: int = 0) -> str:
    """The signature of a callable and why these arguments do not fit it; empty if they do, or if
    it has no signature: then it reports itself what it does not accept.
    """
    try:
        signature = inspect.signature(part)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*[None] * positional, **arguments)
    except TypeError as error:
        return f"{signature}: {error}"
    return ""


def _call(key: str, name: str, part: Any, arguments: Mapping[str, Any], registry: Registry) -> Any:
    try:
        return part(**arguments)
    except RunExit:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        if name not in registry:
            raise JobError(f"{key}: {name} raises {describe(error)}") from None
        # What built-in parts raise for arguments of a wrong type or size, torch's errors among it
        if isinstance(error, (ValueError, TypeError, ArithmeticError, RuntimeError)):
            raise JobError(f"{key}: {name}: {error}") from None
        raise


def load(key: str, name: str, registry: Registry | None = None) -> Any:
    """The callable that a job names: a part of `registry`, or package.module:attribute.

    Raises:
        JobError: for an unknown name, a module or attribute that does not exist, or an own part
            whose module's name stands for another file in this process.
    """
    registry = registry or {}
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
    folders: list[str] = []
    if name not in registry:
        folders = _extend_search_path()
        _refuse_another_file(key, module_name)
    try:
        part: Any = importlib.import_module(module_name)
    except Exception as error:
        if (
            isinstance(error, ModuleNotFoundError)
            and error.name is not None
            and (module_name == error.name or module_name.startswith(error.name + "."))
        ):
            extra = _EXTRAS.get(error.name)
            hint = f"; it comes with the extra {extra!r} of hvdlarge" if extra else ""
            raise JobError(
                f"{key}: there is no module {error.name!r} for {name!r} (looked in "
                f"{' and in '.join(folders[:2])} too){hint}"
            ) from None
        if name in registry or isinstance(error, (RunExit, MemoryError)):
            raise
        raise JobError(f"{key}: {module_name!r} cannot be imported: {describe(error)}") from None
    for step in attribute.split("."):
        try:
            part = getattr(part, step)
        except AttributeError:
            raise JobError(f"{key}: the module {module_name!r} has no {attribute!r}") from None
    if not callable(part):
        raise JobError(f"{key}: {name} is not callable, it is a {type(part).__name__}")
    return part


def _extend_search_path() -> list[str]:
    """Put the current folder on sys.path, as `python -m` does and a console script does not, and
    after it those of the job files; returns them. Loader processes get the same path.
    """
    folders = list(dict.fromkeys([os.getcwd(), *_JOB_FOLDERS]))
    if folders[0] not in sys.path:
        sys.path.insert(0, folders[0])
    # The job that was read last comes first. Folders that were on sys.path anyway stay in place
    sys.path[:] = [entry for entry in sys.path if entry == folders[0] or entry not in _ADDED]
    place = sys.path.index(folders[0]) + 1
    missing = [folder for folder in folders if folder not in sys.path]
    sys.path[place:place] = missing
    _ADDED.update(missing)
    return folders


def _refuse_another_file(key: str, module_name: str) -> None:
    """Raise JobError for a module that was imported from another file than the search finds now,
    such as that of another job in its folder: Python would return the earlier one.
    """
    loaded = getattr(sys.modules.get(module_name), "__file__", None)
    if loaded is None or module_name == "__main__":
        return
    found, folders, parts = None, None, module_name.split(".")
    for count in range(1, len(parts) + 1):
        found = PathFinder.find_spec(".".join(parts[:count]), folders)
        if found is None:
            return
        folders = found.submodule_search_locations
    if found is None or found.origin is None or not found.has_location:
        return
    if os.path.realpath(found.origin) != os.path.realpath(loaded):
        raise JobError(
            f"{key}: {module_name!r} is {found.origin} here, but this process has imported "
            f"{loaded} under that name: rename one of the two, or use a process for each"
        )


def _suggestion(name: str, registry: Registry) -> str:
    suggestion = nearest(name, sorted(registry), "built in are")
    return suggestion if suggestion.endswith("?") else f"{suggestion or 'none is built in'}."
