import importlib
import sys

import pytest
import torch
from pydantic import TypeAdapter

from hvdlarge.config import registry
from hvdlarge.exits import JobError

OWN = """
def numbers(count, *, start=0):
    return list(range(start, start + count))
not_callable = 3
class Outer:
    class Inner:
        pass
import_error = None
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "own_parts.py").write_text(OWN)
    (tmp_path / "broken_parts.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    sys.modules.pop("own_parts", None)


def test_built_in_and_own_objects(own_module):
    assert isinstance(
        registry.instantiate(
            "loss.name", "cross_entropy", {"label_smoothing": 0.1}, registry.LOSSES
        ),
        torch.nn.CrossEntropyLoss,
    )
    assert registry.instantiate(
        "data.name", "own_parts:numbers", {"count": 2, "start": 5}, registry.DATA_SETS
    ) == [
        5,
        6,
    ]
    assert (
        type(
            registry.instantiate("data.name", "own_parts:Outer.Inner", {}, registry.DATA_SETS)
        ).__name__
        == "Inner"
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("convnt", {}, "model.name: unknown name 'convnt'; did you mean 'convnet'"),
        ("zzz", {}, "built in are convnet, mlp, resnet20, resnet50, row_lstm\\. An own"),
        ("convnet", {"widht": 3}, "do not fit convnet.*widht"),
        (":thing", {}, "not of the form package.module:attribute"),
        ("own_parts:", {}, "not of the form package.module:attribute"),
        (".own_parts:thing", {}, "not of the form package.module:attribute"),
        ("nowhere:thing", {}, "there is no module 'nowhere'"),
        ("nowhere.deep:thing", {}, "there is no module 'nowhere'"),
        ("own_parts.deep:thing", {}, "there is no module 'own_parts.deep'"),
        ("own_parts:thing", {}, "the module 'own_parts' has no 'thing'"),
        ("own_parts:not_callable", {}, "is not callable"),
        ("mlp", {"hidden": 5}, "^model.name: mlp: Value after .* must be an iterable"),
        ("mlp", {"inputs": -1}, "^model.name: mlp: .*negative dimension"),
        ("own_parts:numbers", {}, "missing a required argument: 'count'"),
    ],
)
def test_names_that_lead_nowhere(own_module, name, arguments, message):
    with pytest.raises(JobError, match=message):
        registry.instantiate("model.name", name, arguments, registry.MODELS)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_built_in_model_without_width_is_an_error_of_the_job():
    with pytest.raises(JobError, match="^model.name: resnet20: .*zero"):
        registry.instantiate("model.name", "resnet20", {"width": 0}, registry.MODELS)


def test_arguments_of_a_built_in_data_set_that_it_cannot_use_are_an_error_of_the_job():
    with pytest.raises(JobError, match="^data.name: synthetic_images: "):
        registry.instantiate(
            "data.name", "synthetic_images", {"samples": 4, "size": "x"}, registry.DATA_SETS
        )


def test_out_of_memory_in_a_built_in_part_stays_what_it_is():
    with pytest.raises(RuntimeError, match="can't allocate memory|not enough memory"):
        registry.instantiate("model.name", "mlp", {"inputs": 2**50}, registry.MODELS)


def test_an_import_that_fails_inside_the_users_module_is_not_blamed_on_the_job(own_module):
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        registry.instantiate("model.name", "broken_parts:thing", {}, registry.MODELS)


@pytest.mark.parametrize(("section", "key"), [("OPTIMIZERS", "name"), ("DECAYS", "policy")])
def test_a_section_names_itself_as_the_registry_does(section, key):
    entries = getattr(registry, section)
    schemas = [TypeAdapter(kind).json_schema() for kind in registry.union(entries).__args__]
    assert [schema["properties"][key]["const"] for schema in schemas] == list(entries)


def test_every_target_is_there():
    data_sets = [entry.target for entry in registry.DATA_SETS.values()]
    others = [registry.MODELS, registry.LOSSES, registry.METRICS]
    for target in [*data_sets, *(target for entries in others for target in entries.values())]:
        module, _, attribute = target.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute)), target


def test_each_optimizer_has_the_implementation_that_its_section_names():
    for section in registry.union(registry.OPTIMIZERS).__args__:
        module, _, attribute = section.implementation.partition(":")
        kind = getattr(importlib.import_module(module), attribute)
        optimizer = kind([torch.nn.Parameter(torch.ones(2))], **section().options)
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert section().options.items() <= optimizer.param_groups[0].items()
