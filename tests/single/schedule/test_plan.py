"""What a plan knows beforehand."""

from support.launching import ROOT

from hvdlarge.config.job_file import read_job
from hvdlarge.config.planning import estimate, plan_run
from hvdlarge.reporting.describe import rule_notes, stage_table
from hvdlarge.schedule.outline import outline


def test_the_stages_of_a_plan_are_found_once(monkeypatch):
    """For a long run that takes a second, and a start asks for them half a dozen times."""
    calls = []
    monkeypatch.setattr(
        "hvdlarge.schedule.plan.outline", lambda *parts: (calls.append(parts), outline(*parts))[1]
    )
    job = read_job(str(ROOT / "jobs/digits.yaml"))
    plan, before = plan_run(job, 1437, 2), plan_run(job, 1437, 2).fingerprint()
    calls_of_two = len(calls)
    stage_table(plan)
    rule_notes(job, plan)
    assert len(estimate(job, plan, None)["stages"]) == len(plan.stages)
    assert len(calls) == calls_of_two == 2
    assert plan.fingerprint() == before
