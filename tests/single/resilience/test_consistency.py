"""The message of each step: values that differ are named as the user knows them, on every rank."""

import dataclasses

import pytest

from hvdlarge.exits import RanksDisagreeError
from hvdlarge.resilience.consistency import ConsistencyCheck
from hvdlarge.schedule.decision import Decision
from trials.thread_world import World

DECISION = Decision(20, 5120, 3.5, 1, 256, 256, 16, 0.1, False)


@pytest.mark.parametrize(
    ("lr", "digest", "words"),
    [
        (0.2, 2**63, "lr: 0.1 on rank 0, 1 and 0.2 on rank 2"),
        (0.1 + 2**-56, 2**63, "lr: 0.1 on rank 0, 1 and 0.10000000000000002 on rank 2"),
        (-0.1, 2**63, "lr: 0.1 on rank 0, 1 and -0.1 on rank 2"),
        (0.1, 2**63 + 1, f"digest: 8{'0' * 15} on rank 0, 1 and 8{'0' * 14}1 on rank 2"),
        (0.1, 1, f"digest: 8{'0' * 15} on rank 0, 1 and {'0' * 15}1 on rank 2"),
    ],
)
def test_values_that_are_sent_in_two_halves_are_told_whole(lr, digest, words):
    messages = {}

    def action(control, tensors):
        check = ConsistencyCheck(control, 5, dict)
        last = control.rank == 2
        decision = dataclasses.replace(DECISION, lr=lr if last else 0.1)
        check.start(decision, ["a"], digest if last else 2**63)
        with pytest.raises(RanksDisagreeError) as raised:
            check.finish()
        messages[control.rank] = str(raised.value)

    outcome = World(3).run(action)
    assert outcome.error is None
    assert outcome.broken is None
    assert messages == dict.fromkeys(range(3), f"the ranks disagree about the {words}")
