"""The part of a replica that a policy for non-finite gradients touches."""


class CountingStatistics:
    """Counts how often running statistics are put back."""

    restored = 0

    def snapshot(self):
        return "snapshot"

    def restore(self, snapshot):
        assert snapshot == "snapshot"
        self.restored += 1


class CountingAveraging:
    """No micro-batch was without weight."""

    without_weight = 0


class CountingReplica:
    """Two parameters, and statistics that count."""

    def __init__(self):
        self.statistics = CountingStatistics()
        self.averaging = CountingAveraging()
        self.names = {"w": "w", "another": "another"}
