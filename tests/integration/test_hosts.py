"""Starts on hosts that are slow, or not alike."""

import json
import platform

import pytest
from support.launching import MPIRUN, TRAIN

SLOW_SET = """
import time
from hvdlarge.data.digits import digits

def slow():
    time.sleep(6)  # as a large folder of files on a network file system does
    return digits()
"""


def test_building_the_data_set_has_a_limit_of_its_own(train, folder):
    (folder / "slow_set.py").write_text(SLOW_SET)
    job = [
        "jobs/digits.yaml",
        "data.name=slow_set:slow",
        "epochs=0.5",
        "batch.growth={policy: none}",
    ]
    ended = train(2, *job)
    assert ended.code == 0, ended.err
    ended = train(2, *job, "timeouts.data_seconds=3", "run_dir=runs/b")
    assert ended.code == 72, ended.err
    assert "in phase data" in ended.err


@pytest.mark.skipif(
    platform.machine() != "x86_64",
    reason="needs a CPU that can be told to leave its vector units out",
)
def test_workers_that_round_differently_go_on_together(start, folder):
    job = [
        *TRAIN,
        "jobs/digits.yaml",
        "epochs=2",
        "batch.growth={policy: none}",
        "compare_every_steps=10",
    ]
    plain = ["-x", "ATEN_CPU_CAPABILITY=default", "-x", "ONEDNN_MAX_CPU_ISA=SSE41"]
    ended = start([*MPIRUN, "-np", "1", *plain, *job, ":", "-np", "1", *job])
    assert ended.code == 0, ended.err
    assert "the ranks round differently" in ended.out
    assert json.loads((folder / "runs/digits/summary.json").read_text())["accuracy"] > 0.9
