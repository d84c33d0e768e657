"""LARS on the path of a GPU, on any device."""

from hvdlarge.optim.lars import LARS


class LarsInLists(LARS):
    """Measures and moves its tensors as whole lists, also on a CPU."""

    @staticmethod
    def uses_foreach(device):
        """Always."""
        return True
