"""Whole runs in which LARS takes the way of a GPU, on two workers: the weights, and what becomes of a gradient that is not finite.

Where there is no GPU, Triton interprets the kernels; everything else is as in any run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.launching import MPIRUN, environment

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("a GPU takes this way in every run", allow_module_level=True)

FAULTS = Path(__file__).parents[1] / "faults"
PROGRAM = """
import sys
from hvdlarge.optim import lars_gpu
refuses = {"nobody": [], "rank 1": [1], "everybody": [0, 1]}[sys.argv[1]]
from hvdlarge.comm.launcher import detect
import os
if detect(os.environ).rank not in refuses:
    lars_gpu.unsupported_reason = lambda device: None
else:
    lars_gpu.unsupported_reason = lambda device: "made to refuse"
from hvdlarge.train import main
code = main(sys.argv[2:])
if sys.argv[1] == "nobody":
    print("kernels", "hvdlarge.optim.lars_kernels" in sys.modules, flush=True)
sys.exit(code)
"""


@pytest.fixture
def start(tmp_path):
    """Start a run of the faults' job; `refusing` says which ranks cannot take the way of a GPU."""
    (tmp_path / "job.yaml").write_text((FAULTS / "job.yaml").read_text())
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(refusing, *arguments, fault=""):
        command = [
            *MPIRUN,
            "-np",
            "2",
            sys.executable,
            "program.py",
            refusing,
            "job.yaml",
            f"run_dir={refusing.replace(' ', '_')}",
        ]
        paths = os.pathsep.join([str(FAULTS), os.environ.get("PYTHONPATH", "")])
        for path in tmp_path.glob("fired*"):
            path.unlink()
        done = subprocess.run(
            [*command, *arguments],
            cwd=tmp_path,
            env=environment(PYTHONPATH=paths, TRITON_INTERPRET="1", FAULT=fault),
            capture_output=True,
            text=True,
            timeout=280,
        )
        return done.returncode, done.stdout + done.stderr

    run.folder = tmp_path
    return run


def weights(start, name):
    return torch.load(start.folder / name / "checkpoints" / "last.pt", weights_only=True)["model"]


def distance(one, other):
    floats = [name for name, value in other.items() if value.is_floating_point()]
    return max(((one[name] - other[name]).norm() / other[name].norm()).item() for name in floats)


def test_the_weights_are_those_of_the_other_way(start):
    """With clipping, a growth, and checkpoints on the way; and if one rank cannot, none does."""
    arguments = ["precision=fp64", "gradients.clip_norm=0.5", "epochs=1.2"]
    code, text = start("nobody", *arguments)
    assert code == 0, text
    assert text.count("kernels True") == 2
    for refusing in ("everybody", "rank 1"):
        code, text = start(refusing, *arguments)
        assert code == 0, text
        assert "kernels True" not in text
    assert weights(start, "rank_1").keys() == weights(start, "everybody").keys()
    assert all(
        torch.equal(value, weights(start, "everybody")[name])
        for name, value in weights(start, "rank_1").items()
    )
    assert 0 < distance(weights(start, "nobody"), weights(start, "everybody")) < 1e-12
    ratios = [
        [
            json.loads(line)["trust_ratio_min"]
            for line in (start.folder / name / "metrics.jsonl").read_text().splitlines()
            if "trust_ratio_min" in line
        ]
        for name in ("nobody", "everybody")
    ]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-9)
    assert ratios[0]


def test_a_gradient_that_is_not_finite_is_named_with_its_step(start):
    found = []
    for refusing in ("nobody", "everybody"):
        code, text = start(refusing, fault="nan@1:25")
        assert code == 73, text
        assert text.count("hvdlarge: error:") == 1
        found.append(next(line for line in text.splitlines() if "hvdlarge: error:" in line))
    assert found[0] == found[1]
    assert "is not finite at step 24" in found[0]


def test_a_rollback_ends_with_the_weights_of_the_other_way(start):
    for refusing in ("nobody", "everybody"):
        code, text = start(
            refusing,
            "precision=fp64",
            "on_nonfinite={policy: rollback, lr_factor: 0.25}",
            "epochs=1",
            fault="nan@1:25",
        )
        assert code == 0, text
        assert "back to step 20" in text
    assert distance(weights(start, "nobody"), weights(start, "everybody")) < 1e-12
