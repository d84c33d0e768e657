"""Whole runs in this process, through the function that `train` calls, on a world that is given."""

import torch

from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.config.job_file import parse_job
from hvdlarge.resilience.preemption import StopRequest
from hvdlarge.resilience.watchdog import Watchdog
from hvdlarge.training.run import run
from hvdlarge.world import RankContext

JOB = """
name: law
epochs: 3.1
precision: fp64
data: {name: 'own_parts:plain'}
model: {name: 'own_parts:Net'}
batch: {base: 8, micro: 4, growth: {policy: adabatch, factor: 2, every_epochs: 1, max: 30}}
lr: {base: 0.5}
optimizer: {name: lars, weight_decay: 1e-3, trust_coefficient: 0.02}
evaluate: {every_epochs: 1, micro_batch: 7}
log: {every_steps: 5}
compare_every_steps: 2
"""


class StopAfter(StopRequest):
    """Asks for a stop in a step."""

    def __init__(self, steps):
        super().__init__()
        self.left = steps

    def requested(self):
        self.left -= 1
        return self.left < 0


def job_of(changes):
    return parse_job(JOB, "law", changes)


def train(job, control, tensors, place, stop_after=None):
    """Train a job, or go on with it; what its last checkpoint holds."""
    job = job.model_copy(update={"run_dir": str(place)})
    stop = StopRequest() if stop_after is None else StopAfter(stop_after)
    file = place.parent / f"job-{control.rank}.yaml"
    file.write_text(JOB)
    watchdog = Watchdog(control.rank, job.timeouts.limits())
    try:
        run(job, file, False, RankContext(None, {}, control, tensors, watchdog, stop))
    finally:
        watchdog.stop()
        torch.use_deterministic_algorithms(False)  # what exact mode has set for the whole process
    control.barrier()
    return torch.load(place / "checkpoints/last.pt", weights_only=True)


def alone(job, control, place):
    """What the last checkpoint holds where rank 0 trains the job alone, on every rank."""
    if control.rank == 0:
        train(job, SoloChannel(), SoloCollectives(), place / "alone")
    control.barrier()
    return torch.load(place / "alone/checkpoints/last.pt", weights_only=True)


def worlds(control, tensors):
    """The channels of a run by name: all ranks together, and on rank 0 that rank alone."""
    many = {"many": (control, tensors)}
    return many | ({"alone": (SoloChannel(), SoloCollectives())} if control.rank == 0 else {})
