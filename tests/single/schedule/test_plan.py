"""What a plan knows beforehand."""

import dataclasses
import datetime
import hashlib
import json
from dataclasses import dataclass, field
from decimal import Decimal

from support.launching import ROOT

from hvdlarge.config.job_file import read_job
from hvdlarge.config.planning import estimate, plan_run
from hvdlarge.reporting.describe import rule_notes, stage_table
from hvdlarge.schedule.decay import ConstantDecay
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


@dataclass(frozen=True)
class Since(ConstantDecay):
    """With settings that JSON has no form for."""

    since: datetime.date = datetime.date(2026, 1, 2)
    share: Decimal = Decimal("0.5")
    days: frozenset[str] = frozenset(["mon", "tue", "wed"])
    by_day: dict[datetime.date, int] = field(default_factory=lambda: {datetime.date(2026, 1, 2): 3})


def test_settings_of_an_own_policy_that_json_has_no_form_for_count_in_the_fingerprint():
    plan = plan_run(read_job(str(ROOT / "jobs/digits.yaml")), 1437, 2)

    def fingerprint(**settings):
        schedule = dataclasses.replace(plan.lr_schedule, decay=Since(**settings))
        return dataclasses.replace(plan, lr_schedule=schedule).fingerprint()

    assert fingerprint() == fingerprint(days=frozenset(["wed", "tue", "mon"]))
    others = [
        {"since": datetime.date(2026, 1, 3)},
        {"share": Decimal("0.25")},
        {"days": frozenset(["mon"])},
        {"by_day": {datetime.date(2026, 1, 3): 3}},
    ]
    assert len({fingerprint(), *(fingerprint(**other) for other in others)}) == 5


def test_the_fingerprint_of_settings_in_json_stays_what_it_was():
    """Runs that were begun with an earlier version are compared by it."""
    plan = plan_run(read_job(str(ROOT / "jobs/digits.yaml")), 1437, 2)
    names = ("clock", "base_batch", "initial_batch", "micro_batch", "growth", "lr_schedule")
    plain = {name: value for name, value in dataclasses.asdict(plan).items() if name in names}
    text = json.dumps(plain, sort_keys=True)
    assert plan.fingerprint() == hashlib.sha256(text.encode()).hexdigest()[:16]
