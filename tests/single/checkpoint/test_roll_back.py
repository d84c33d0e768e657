"""Where a rollback goes back to: the job's cadence decides it, never an interruption."""

import pytest
import torch

from hvdlarge.checkpoint import resume
from hvdlarge.checkpoint.content import CheckpointContent, RunFacts
from hvdlarge.checkpoint.folder import CheckpointFolder
from hvdlarge.exits import CheckpointError, CheckpointWriteError
from hvdlarge.replica.train_state import TrainState
from hvdlarge.schedule.plan import RunProgress


def model_at(step):
    model = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(model.weight, step)
    return model


def save(folder, step, also_keep=None):
    state = {name: value.clone() for name, value in model_at(step).state_dict().items()}
    content = CheckpointContent(
        RunFacts({}, {}, {}, 1), state, {}, {}, RunProgress(step=step), False, TrainState(), (), {}
    )
    folder.save(content.to_plain(), step, best=False, wait=True, also_keep=also_keep)


def damage(folder, step):
    path = folder.folder / f"step_{step:09d}.pt"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture
def folder(tmp_path):
    """The cadence asked for 0 and 10, a stop for 15 and 17."""
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=1)
    for step, scheduled in ((0, 0), (10, 10), (15, 10), (17, 10)):
        save(folder, step, also_keep=scheduled)
    return folder


def steps(folder):
    return sorted(int(path.stem.removeprefix("step_")) for path in folder.newest_first())


def test_roll_back_passes_over_what_a_stop_has_written_and_removes_it(folder):
    assert steps(folder) == [10, 17]  # keep: 1, and that of the cadence
    model = model_at(99)
    found = resume.roll_back(folder, {"": model}, 10)
    assert (found.content.progress.step, found.notes) == (10, [])
    assert (model.weight == 10).all()
    assert steps(folder) == [10]
    assert "step_000000017.pt" not in (folder.folder / "SHA256SUMS").read_text()


def test_roll_back_with_a_damaged_scheduled_checkpoint_takes_the_newest_and_says_so(folder):
    damage(folder, 10)
    found = resume.roll_back(folder, {"": model_at(99)}, 10)
    assert found.content.progress.step == 17
    (note,) = found.notes
    assert "step_000000010.pt: damaged" in note


def test_roll_back_without_any_whole_checkpoint_is_an_error(folder):
    damage(folder, 10)
    damage(folder, 17)
    with pytest.raises(CheckpointError, match="no checkpoint of this run can be read"):
        resume.roll_back(folder, {"": model_at(99)}, 10)


def test_roll_back_from_a_run_that_knows_no_schedule_takes_the_newest(folder):
    assert resume.roll_back(folder, {"": model_at(99)}, None).content.progress.step == 17


def test_roll_back_that_cannot_remove_what_is_above_ends_as_a_failed_write(folder, monkeypatch):
    def fail(step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "remove_above", fail)
    with pytest.raises(CheckpointWriteError, match="No space left"):
        resume.roll_back(folder, {"": model_at(99)}, 10)
    assert steps(folder) == [10, 17]
