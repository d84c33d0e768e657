import math

import pytest

from hvdlarge.schedule.decision import DECISION_BYTES, Decision


def test_a_decision_survives_the_channel_bit_for_bit():
    for lr in (0.1, 1e-300, math.nextafter(0.1, 1), 1e300):
        decision = Decision(2**40, 2**50, 12.3456789, 3, 8192, 8000, 64, lr, is_last=True)
        record = decision.to_bytes()
        assert len(record) == DECISION_BYTES
        assert Decision.from_bytes(record) == decision


def test_other_bytes_are_refused():
    with pytest.raises(ValueError, match="decision record"):
        Decision.from_bytes(b"short")
