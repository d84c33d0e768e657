"""What a run reports before its first step."""

import pytest
import torch

from hvdlarge.config.job_file import read_job
from hvdlarge.reporting.describe import rule_notes, update_line


@pytest.mark.parametrize(
    ("settings", "shown"),
    [
        ({"momentum": 0.9}, "momentum 0.9, weight_decay 0"),
        ({"betas": (0.9, 0.999)}, "betas 0.9 and 0.999, weight_decay 0"),
        ({"betas": ((0.9, 0.95), 0.999)}, "betas 0.9 and 0.95 and 0.999, weight_decay 0"),
        ({"betas": torch.tensor([0.5, 0.25])}, "betas 0.5 and 0.25, weight_decay 0"),
        ({"momentum": torch.tensor(0.5)}, "momentum 0.5, weight_decay 0"),
        ({"momentum": "nesterov"}, "momentum nesterov, weight_decay 0"),
        ({"momentum": None, "alpha": True}, "momentum None, alpha True, weight_decay 0"),
        ({"alpha": "x" * 99}, f"alpha {'x' * 39}…, weight_decay 0"),
    ],
)
def test_settings_of_an_optimizer_may_be_of_any_type(settings, shown):
    class Own(torch.optim.SGD):
        pass

    optimizer = Own([torch.nn.Parameter(torch.ones(3))], lr=1)
    group = {"params": optimizer.param_groups[0]["params"], "adapt": True, "weight_decay": 0.0}
    optimizer.param_groups[0] = group | settings
    assert update_line(optimizer) == f"Own, {shown}"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([], None),
        (["batch.micro=32"], "not every step has two"),
        (["batch.micro=32", "batch.growth={policy: none}"], "no step has two"),
        (["batch.micro=32", "log={}"], None),
    ],
)
def test_steps_without_gradient_noise_are_reported(changes, said):
    job = read_job("jobs/digits.yaml", changes)
    notes = [line for line in rule_notes(job, job.plan(1437, 2)) if "noise_every_steps" in line]
    assert bool(notes) == (said is not None)
    assert not notes or said in notes[0]
