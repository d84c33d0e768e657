import importlib
import sys

import pytest
import torch
from pydantic import TypeAdapter

from hvdlarge.config import registry
from hvdlarge.exits import JobError
from hvdlarge.models.losses import CrossEntropyLoss

OWN = """
def numbers(count, *, start=0):
    return list(range(start, start + count))
not_callable = 3
class Outer:
    class Inner:
        pass
import_error = None
"""


FAILING = """
def data(size=3):
    return read(size)

def read(size):
    raise TypeError(f"size {size} is no path")
"""


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "parts_of_a_test.py").write_text(OWN)
    (tmp_path / "broken_parts.py").write_text("import a_module_that_is_not_there\n")
    (tmp_path / "typing_error.py").write_text("def data(:\n    pass\n")
    (tmp_path / "failing_parts.py").write_text(FAILING)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(registry, "_JOB_FOLDERS", [])
    yield
    for name in ("parts_of_a_test", "failing_parts"):
        sys.modules.pop(name, None)


def test_built_in_and_own_objects(own_module):
    assert isinstance(
        registry.instantiate(
            "loss.name", "cross_entropy", {"label_smoothing": 0.1}, registry.LOSSES
        ),
        CrossEntropyLoss,
    )
    assert registry.instantiate(
        "data.name", "parts_of_a_test:numbers", {"count": 2, "start": 5}, registry.DATA_SETS
    ) == [
        5,
        6,
    ]
    assert (
        type(
            registry.instantiate("data.name", "parts_of_a_test:Outer.Inner", {}, registry.DATA_SETS)
        ).__name__
        == "Inner"
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("convnt", {}, "model.name: unknown name 'convnt'; did you mean 'convnet'"),
        ("zzz", {}, "built in are alexnet, alexnet_bn, convnet, gnmt, .*vgg19_bn\\. An own"),
        ("convnet", {"widht": 3}, "do not fit convnet.*widht"),
        (":thing", {}, "not of the form package.module:attribute"),
        ("parts_of_a_test:", {}, "not of the form package.module:attribute"),
        (".parts_of_a_test:thing", {}, "not of the form package.module:attribute"),
        ("nowhere:thing", {}, "there is no module 'nowhere'"),
        ("nowhere.deep:thing", {}, "there is no module 'nowhere'"),
        ("parts_of_a_test.deep:thing", {}, "there is no module 'parts_of_a_test.deep'"),
        ("parts_of_a_test:thing", {}, "the module 'parts_of_a_test' has no 'thing'"),
        ("parts_of_a_test:not_callable", {}, "is not callable"),
        ("mlp", {"hidden": 5}, "^model.name: mlp: Value after .* must be an iterable"),
        ("mlp", {"inputs": -1}, "^model.name: mlp: .*negative dimension"),
        ("parts_of_a_test:numbers", {}, "missing a required argument: 'count'"),
    ],
)
def test_names_that_lead_nowhere(own_module, name, arguments, message):
    with pytest.raises(JobError, match=message):
        registry.instantiate("model.name", name, arguments, registry.MODELS)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("broken_parts:thing", r"'broken_parts' cannot be imported: ModuleNotFoundError: No module named 'a_module_that_is_not_there' \(.*broken_parts.py, line 1, in <module>\)\n"),
        ("typing_error:data", r"'typing_error' cannot be imported: SyntaxError: .* \(.*typing_error.py, line 1\)\n"),
        ("failing_parts:data", r"failing_parts:data raises TypeError: size 3 is no path \(.*failing_parts.py, line 6, in read\)\n"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["data.name", "model.name", "loss.name", "evaluate.metrics"])
def test_an_own_part_that_fails_is_reported_with_its_line_and_without_the_engines(
    own_module, key, name, words
):
    with pytest.raises(JobError, match=f"^{key}: {words}") as raised:
        registry.instantiate(key, name, {}, {})
    assert "hvdlarge/" not in str(raised.value)
    assert str(raised.value).count("Traceback") == (name != "typing_error:data")


def test_own_parts_are_looked_for_beside_the_job_file_after_the_current_folder(
    own_module, tmp_path
):
    beside = tmp_path / "jobs"
    beside.mkdir()
    (beside / "parts_of_a_test.py").write_text("def numbers(count):\n    return 'of the job'\n")
    (beside / "job_parts.py").write_text("def numbers(count):\n    return ['of the job'] * count\n")
    registry.look_beside("jobs/job.yaml")
    assert registry.instantiate("data.name", "job_parts:numbers", {"count": 1}, {}) == [
        "of the job"
    ]
    assert registry.instantiate("data.name", "parts_of_a_test:numbers", {"count": 1}, {}) == [0]
    assert sys.path.index(str(tmp_path)) < sys.path.index(str(beside))
    with pytest.raises(JobError) as raised:
        registry.instantiate("data.name", "nowhere:thing", {}, {})
    assert f"(looked in {tmp_path} and in {beside} too)" in str(raised.value)
    sys.modules.pop("job_parts")


@pytest.fixture
def two_folders(own_module, tmp_path, monkeypatch):
    """Folders of two jobs, each with modules of the same names; returns a function that reads the
    job of one of them and then loads a part.
    """
    monkeypatch.setattr(registry, "_ADDED", set())
    for name in ("a", "b"):
        (tmp_path / name / "named_twice").mkdir(parents=True)
        (tmp_path / name / "named_twice/parts.py").write_text(f"def which(): return {name!r}\n")
        (tmp_path / name / "twice.py").write_text(f"def which(): return {name!r}\n")
    (tmp_path / "b/only.py").write_text("def which(): return 'b'\n")

    def load(folder, part):
        registry.look_beside(f"{folder}/job.yaml")
        return registry.load("data.name", part)()

    yield load
    for name in ("twice", "named_twice.parts", "named_twice", "only"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("part", "file"), [("twice:which", "twice.py"), ("named_twice.parts:which", "named_twice/parts.py")]
)  # fmt: skip
def test_a_module_that_another_job_loaded_under_the_same_name_is_refused(
    two_folders, tmp_path, part, file
):
    assert two_folders("a", part) == "a"
    with pytest.raises(JobError, match="^data.name: ") as raised:
        two_folders("b", part)
    for folder in ("a", "b"):
        assert str(tmp_path / folder / file) in str(raised.value)
    assert two_folders("a", part) == "a"


def test_the_folder_of_the_job_that_was_read_last_comes_first_again(two_folders):
    registry.look_beside("a/job.yaml")
    assert two_folders("b", "only:which") == "b"
    assert two_folders("a", "twice:which") == "a"


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
