"""The message of each step: every disagreement is named in the step in which it happens, on every rank."""

import dataclasses
import math

import pytest

from hvdlarge.exits import RanksDisagreeError
from hvdlarge.resilience.consistency import ConsistencyCheck, StepFlags
from hvdlarge.schedule.decision import Decision

DECISION = Decision(20, 5120, 3.5, 1, 256, 256, 16, 0.1, False)


def exchange(
    control, tensors, decision=DECISION, gradients=("a", "b"), job=5, digest=None, **wishes
):
    consistency = ConsistencyCheck(control, job, lambda: wishes)
    uneven = wishes.pop("uneven", False)
    consistency.start(decision, None if gradients is None else list(gradients), digest, uneven)
    return consistency.finish()


def test_ranks_that_agree_hear_what_any_of_them_asks_for(control, tensors):
    last = control.rank == control.size - 1
    assert exchange(control, tensors) == StepFlags(False, False, False, False)
    assert exchange(control, tensors, stop=last) == StepFlags(True, False, False, False)
    assert exchange(control, tensors, save=control.rank == 0, failed=last) == StepFlags(
        False, True, True, False
    )
    assert exchange(control, tensors, uneven=last) == StepFlags(False, False, False, True)


def test_an_idle_rank_has_no_view_of_the_gradients(control, tensors):
    exchange(control, tensors, gradients=None if control.rank == control.size - 1 else ("a",))
    exchange(control, tensors, gradients=None)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("step", {"decision": dataclasses.replace(DECISION, step=21)}),
        ("samples_seen", {"decision": dataclasses.replace(DECISION, samples_seen=5376)}),
        ("global_batch", {"decision": dataclasses.replace(DECISION, global_batch=128)}),
        ("lr: 0.1 on", {"decision": dataclasses.replace(DECISION, lr=math.nextafter(0.1, 1))}),
        ("lr: 0.1 on", {"decision": dataclasses.replace(DECISION, lr=0.2)}),
        ("set of gradients", {"gradients": ("a",)}),
        ("job", {"job": 6}),
        ("digest", {"digest": 2**63 + 1}),
    ],
)
def test_a_rank_that_differs_is_found_in_the_same_step(control, tensors, name, changes):
    if control.size == 1:
        pytest.skip("one rank agrees with itself")
    other = control.rank == control.size - 1
    usual = {"digest": 2**63} if name == "digest" else {}
    with pytest.raises(RanksDisagreeError, match=f"disagree about the {name}") as raised:
        exchange(control, tensors, **(changes if other else usual))
    assert f"on rank {control.size - 1}" in str(raised.value)
    assert exchange(control, tensors) == StepFlags(
        False, False, False, False
    )  # the channel is still usable
