"""The weights from which a run starts: which fit, under which names, and what is reported otherwise."""

import pytest
import torch
from support.comparing import read_lines
from torch import nn

import hvdlarge
from hvdlarge.checkpoint.initial_weights import compare, load_initial_weights, renamed
from hvdlarge.checkpoint.weight_files import write_weights
from hvdlarge.config.job import InitFrom
from hvdlarge.exits import CheckpointError, JobError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.head.weight


@pytest.fixture
def file(tmp_path):
    """Writes a state_dict; the path."""

    def write(state, name="weights.pt"):
        torch.save(state, tmp_path / name)
        return str(tmp_path / name)

    return write


def source():
    torch.manual_seed(1)
    return {name: value.clone() for name, value in Net().state_dict().items()}


def loaded(path, **options):
    torch.manual_seed(2)
    model = Net()
    return model, load_initial_weights(InitFrom(path=path, **options), model)


def holds(model, state):
    return all(torch.equal(model.state_dict()[name], value) for name, value in state.items())


def test_a_state_dict_is_loaded(file):
    path = file(source())
    model, notes = loaded(path)
    assert holds(model, source())
    assert model.again.weight is model.head.weight
    assert len(notes) == 1
    assert notes[0].startswith(f"init_from: 11 tensors are those of {path} (sha256:")


def test_a_checkpoint_gives_its_model(file):
    model, _ = loaded(file({"format": 1, "model": source(), "optimizer": {"a": {}}}))
    assert holds(model, source())


def test_safetensors_are_loaded(tmp_path):
    pytest.importorskip("safetensors")
    write_weights(tmp_path / "weights.safetensors", source(), {"job": "a"})
    assert holds(loaded(str(tmp_path / "weights.safetensors"))[0], source())


def test_a_tied_tensor_may_have_one_of_its_names(file):
    state = source()
    del state["again.weight"]
    assert holds(loaded(file(state))[0], source())
    state = source()
    state["again.weight"] = state["again.weight"] + 1
    with pytest.raises(
        JobError, match="differ that are one in the model\n  'head.weight' and 'again.weight'"
    ):
        loaded(file(state))


def test_numbers_take_the_width_of_the_model(file):
    wide = {n: v.double() if v.is_floating_point() else v for n, v in source().items()}
    model, _ = loaded(file(wide))
    assert model.stem.weight.dtype == torch.float32
    assert holds(model, source())


def mistaken():
    state = source()
    state["extra"] = torch.ones(2)
    state["head.bias"] = torch.ones(7)
    state["norm.num_batches_tracked"] = torch.tensor(1.0)
    del state["stem.weight"], state["norm.bias"]
    return state


def test_all_that_does_not_fit_is_listed_in_one_error(file):
    torch.manual_seed(2)
    before = Net()
    with pytest.raises(JobError) as raised:
        loaded(file(mistaken()))
    first, *lines = str(raised.value).splitlines()
    assert raised.value.code == 2
    assert len(first) <= 200
    assert "2 missing, 1 unexpected, 2 of another shape or type" in first
    assert lines == [
        "  missing: stem.weight, norm.bias",
        "  unexpected: extra",
        "  of another shape or type: norm.num_batches_tracked (float32[] in the file, int64[] in the "
        "model), head.bias (float32[7] in the file, float32[4] in the model)",
    ]
    model = Net()
    model.load_state_dict(before.state_dict())
    with pytest.raises(JobError):
        load_initial_weights(InitFrom(path=file(mistaken())), model)
    assert holds(model, before.state_dict())  # nothing was changed


def test_without_strict_it_is_listed_in_a_note(file):
    model, notes = loaded(file(mistaken()), strict=False)
    assert holds(model, {name: source()[name] for name in ("norm.weight", "again.bias")})
    assert model.norm.num_batches_tracked == 0
    (note,) = notes[1:]
    assert "missing: stem.weight, norm.bias; unexpected: extra; of another shape" in note


def test_nothing_that_fits_is_an_error_even_without_strict(file):
    with pytest.raises(JobError, match="none of its tensors fits"):
        loaded(file({"other": torch.ones(1)}), strict=False)


def test_a_missing_prefix_is_suggested(file):
    state = {f"module.{name}": value for name, value in source().items()}
    with pytest.raises(JobError, match=r"did you mean init_from.prefix: module\. \?"):
        loaded(file(state))
    assert holds(loaded(file(state), prefix="module.")[0], source())


def test_names_are_mapped(file):
    state = {name.replace("stem.", "encoder.0.").replace("head", "classifier"): value
             for name, value in source().items()}  # fmt: skip
    patterns = {"encoder.?.*": "stem.*", "classifier.*": "head.*"}
    assert holds(loaded(file(state), map=patterns)[0], source())


@pytest.mark.parametrize(
    ("prefix", "patterns", "message"),
    [
        ("model.", {}, "no name begins with the prefix 'model.'"),
        ("", {"x*": "y*"}, r"map: the pattern 'x\*' matches no name"),
        ("", {"*": "a*", "b.*": "c"}, r"map: the pattern 'b.\*' matches no name"),
        ("", {"a.*": "*.*"}, "has more wildcards than the pattern"),
        ("", {"a.*": "b.*"}, "'a.w' and 'b.w' are both 'b.w'"),
    ],
)
def test_prefixes_and_patterns_that_cannot_be_meant(prefix, patterns, message):
    with pytest.raises(JobError, match=message):
        renamed({"a.w": 1, "b.w": 2}, prefix, patterns)


def test_wildcards_take_what_those_of_the_old_name_have_matched():
    saved = {"layer3.conv1.weight": 1, "layer3.bn1.bias": 2}
    assert renamed(saved, "", {"layer?.conv?.*": "blocks.?.*.?", "*": "*"}) == {
        "blocks.3.weight.1": 1,
        "layer3.bn1.bias": 2,
    }


def test_values_that_are_not_finite_are_refused(file):
    state = source()
    state["stem.bias"][0] = float("nan")
    with pytest.raises(JobError, match="its tensor 'stem.bias' is not finite"):
        loaded(file(state))


def test_extra_state_is_compared_and_loaded(file):
    class Remembering(nn.Linear):
        seen = 3

        def get_extra_state(self):
            return {"seen": self.seen}

        def set_extra_state(self, state):
            self.seen = state["seen"]

    state = Remembering(2, 2).state_dict() | {"_extra_state": {"seen": 8}}
    model = Remembering(2, 2)
    load_initial_weights(InitFrom(path=file(state)), model)
    assert model.seen == 8
    del state["_extra_state"]
    assert compare(state, model).missing == ["_extra_state"]


@pytest.mark.parametrize("length", [60, 250])
def test_the_first_line_of_a_message_is_short(tmp_path, length):
    folder = tmp_path
    while len(str(folder)) < length:
        folder = folder / ("long" * 10)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(source() | {"x" * 300: torch.ones(1)}, folder / "w.pt")
    (folder / "cut.pt").write_bytes((folder / "w.pt").read_bytes()[:500])
    for name, prefix in (("w.pt", ""), ("w.pt", "y" * 40), ("cut.pt", ""), ("none.pt", "")):
        with pytest.raises(JobError) as raised:
            loaded(str(folder / name), prefix=prefix)
        assert len(str(raised.value).splitlines()[0]) <= 200


JOB = {
    "name": "first",
    "epochs": 1,
    "precision": "fp64",
    "data": {"name": "parallel.own_parts:plain"},
    "model": {"name": "parallel.own_parts:Normed"},
    "batch": {"base": 8, "micro": 8},
    "lr": {"base": 0.5},
}


def test_a_run_from_another_runs_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = hvdlarge.run_job(JOB)
    tuned = JOB | {"name": "second", "init_from": "runs/first/checkpoints/last.pt"}
    second = hvdlarge.run_job(tuned)
    assert second["loss"] < first["loss"]
    (start,) = read_lines(tmp_path / "runs/second/starts.jsonl")
    assert "init_from: 9 tensors are those of runs/first/checkpoints/last.pt" in start["notes"][0]
    with pytest.raises(CheckpointError, match="init_from is .* in the folder, null in this job"):
        hvdlarge.run_job(JOB | {"name": "second"})
    with pytest.raises(JobError, match="there is no such file"):
        hvdlarge.run_job(tuned | {"name": "third", "init_from": "gone.pt"})
    assert not (tmp_path / "runs/third").exists()
    itself = tuned | {"init_from": "runs/second/checkpoints/last.pt"}
    hvdlarge.run_job(itself, fresh=True)  # read before the folder is set aside


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 2)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))


def test_a_buffer_may_hold_infinities(file):
    state = Masked().state_dict()
    assert not torch.isfinite(state["mask"]).all()
    load_initial_weights(InitFrom(path=file(state)), Masked())
    state["mask"] = torch.full((3, 3), torch.nan)
    with pytest.raises(JobError, match="its tensor 'mask' is not finite"):
        load_initial_weights(InitFrom(path=file(state)), Masked())
