"""`hvdlarge.run_job` with objects, in a program that a launcher starts."""

import json
import sys

import pytest
import torch
from support.launching import MPIRUN

PROGRAM = """
import os, sys
import torch
import hvdlarge

torch.manual_seed(len(sys.argv) + int(sys.argv[2]))  # unlike weights on unlike ranks would be rank 0's
inputs = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
pairs = hvdlarge.InMemory(inputs, inputs[:, :3].argmax(dim=1))
job = {
    "name": "objects", "run_dir": sys.argv[1], "epochs": 2, "precision": "fp64",
    "batch": {"base": 8, "micro": 4, "growth": {"policy": "adabatch", "every_epochs": 1, "max": 16}},
    "lr": {"base": 1.0}, "optimizer": {"weight_decay": 1e-3},
}
for turn in range(2):  # the second finds the run finished
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 3))
    summary = hvdlarge.run_job(job, model=model, data=(pairs, pairs), loss=torch.nn.CrossEntropyLoss())
    assert model.training and next(model.parameters()).dtype == torch.float32
    with torch.no_grad():
        model(inputs).sum()
    from hvdlarge.comm.launcher import detect
    launch = detect(os.environ)
    rank = 0 if launch is None else launch.rank
    torch.save({"model": model.state_dict(), "steps": summary["steps"]}, f"{sys.argv[1]}-{turn}-{rank}.pt")
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_objects_are_trained_on_every_rank_and_hold_the_trained_weights(start, folder, workers):
    (folder / "program.py").write_text(PROGRAM)
    launcher = [] if workers == 1 else [*MPIRUN, "-np", str(workers)]
    ended = start([*launcher, sys.executable, "program.py", "run", "0"])
    assert ended.code == 0, ended.text
    steps = json.loads((folder / "run/summary.json").read_text())["steps"]
    kept = torch.load(folder / "run/checkpoints/last.pt", weights_only=True)["model"]
    for turn in range(2):
        for rank in range(workers):
            saved = torch.load(folder / f"run-{turn}-{rank}.pt", weights_only=True)
            assert saved["steps"] == steps
            for name, value in saved["model"].items():
                if (
                    "running" not in name and "tracked" not in name
                ):  # the program's own pass moved them
                    assert torch.equal(value, kept[name].to(value.dtype)), (turn, rank, name)
                else:
                    assert (value - kept[name]).abs().max() <= 1 + 0.2 * kept[name].abs().max()


def test_a_job_that_is_wrong_is_raised_on_every_rank(start, folder):
    (folder / "program.py").write_text(PROGRAM.replace('"epochs": 2', '"epochs": -2'))
    ended = start([*MPIRUN, "-np", "2", sys.executable, "program.py", "run", "0"])
    assert ended.code == 1
    assert ended.err.count("JobError: job.yaml: 1 problem in the job file") == 2


WITHOUT_HOROVOD = """
import sys
sys.modules["horovod.torch"] = None  # as where it is not installed
import hvdlarge
from hvdlarge.exits import InvalidEnvironmentError

try:
    hvdlarge.run_job("digits")
except InvalidEnvironmentError as error:
    print(f"the program goes on: {error}", flush=True)
"""


def test_a_program_goes_on_where_horovod_is_missing(start, folder):
    (folder / "program.py").write_text(WITHOUT_HOROVOD)
    ended = start([*MPIRUN, "-np", "2", sys.executable, "program.py"])
    assert ended.code == 0, ended.text
    assert ended.text.count("the program goes on: ") == 2
    assert "horovod.torch does not load here" in ended.text
