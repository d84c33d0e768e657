import sys

import pytest
import torch

from hvdlarge.config import registry as named
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
        named.build("loss.name", "cross_entropy", {"label_smoothing": 0.1}, named.LOSSES),
        torch.nn.CrossEntropyLoss,
    )
    assert named.build("data.name", "own_parts:numbers", {"count": 2, "start": 5}, named.DATA) == [
        5,
        6,
    ]
    assert (
        type(named.build("data.name", "own_parts:Outer.Inner", {}, named.DATA)).__name__ == "Inner"
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
        ("own_parts:numbers", {}, "missing a required argument: 'count'"),
    ],
)
def test_names_that_lead_nowhere(own_module, name, arguments, message):
    with pytest.raises(JobError, match=message):
        named.build("model.name", name, arguments, named.MODELS)


def test_an_import_that_fails_inside_the_users_module_is_not_blamed_on_the_job(own_module):
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        named.build("model.name", "broken_parts:thing", {}, named.MODELS)
