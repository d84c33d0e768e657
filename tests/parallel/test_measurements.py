"""Measurements of a run over real MPI and Horovod are those of the same run on one worker."""

import pytest
from support.quadratic import JOB, comparable

from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.config.job_file import parse_job
from hvdlarge.exits import FINISHED
from trials.engine import StopAtStep, join_checkpoint_writers, preserved_settings, run_rank


def measured(job, folder, control, tensors):
    """The lines of the log and of the decisions of a whole run, without times."""
    folder.with_suffix(".yaml").write_text(JOB)
    run = job.model_copy(update={"run_dir": str(folder)})
    with preserved_settings():
        assert run_rank(run, folder, control, tensors, StopAtStep(None)) == (FINISHED, "")
        join_checkpoint_writers()
    return comparable(folder), (folder / "decisions.jsonl").read_text()


def test_measurements_do_not_depend_on_the_number_of_workers(control, tensors, folder):
    job = parse_job(JOB, "job")
    lines, decisions = measured(job, folder / "all", control, tensors)
    if control.rank == 0:
        alone, expected = measured(job, folder / "one", SoloChannel(), SoloCollectives())
        assert decisions == expected
        assert decisions.count("grew_from") >= 2
        assert len(lines) == len(alone)
        assert sum(line.get("noise_scale") is not None for line in lines) >= 3
        for line, other in zip(lines, alone, strict=True):
            assert line == pytest.approx(other, rel=1e-9, abs=1e-12)
    control.allgather(b"")  # no rank goes on while rank 0 trains alone
