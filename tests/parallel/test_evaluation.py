"""An evaluation gives the same results on any number of workers, also where some have nothing to do."""

import pytest
import torch

from hvdlarge.comm.solo import SoloChannel, SoloCollectives
from hvdlarge.config.job_file import parse_job
from hvdlarge.data.samples import SampleForm
from hvdlarge.data.transforms import Transforms
from hvdlarge.evaluation.states import StateMetric
from hvdlarge.optim.precision import Precision
from hvdlarge.training import build

JOB = """
name: evaluated
epochs: 1
precision: fp64
data: {name: digits}
model: {name: convnet, args: {width: 2}}
batch: {base: 8, micro: 4}
lr: {base: 1}
evaluate: {metrics: ["own_parts:Squares", accuracy, "own_parts:NotApplicable", "own_parts:Wrong"]}
"""


# 360 samples: many micro-batches, a short last one, one for each of two workers, one in all.
@pytest.mark.parametrize("micro_batch", [7, 50, 180, 360])
def test_results_are_the_same_on_any_number_of_workers(control, tensors, micro_batch):
    job = parse_job(JOB, "job", [f"evaluate.micro_batch={micro_batch}"])
    precision = Precision(job.precision, torch.device("cpu"))
    objective, optimizer, _ = build.build_learning(job, precision)
    components = build.Components(objective, None, None, {}, None, optimizer)
    replica = build.build_replica(job, components, SoloChannel(), SoloCollectives())
    _, test_set = build.load_data(job.data, job.seed)

    def results(rank, size, collectives):
        metrics = build.build_metrics(job)
        evaluation = build.build_evaluation(
            job.data, job.evaluate, metrics, SampleForm(), test_set, rank, size, Transforms()
        )
        return evaluation.run(replica, collectives)

    together, alone = results(control.rank, control.size, tensors), results(0, 1, SoloCollectives())
    assert list(together) == ["test_loss", "Squares", "accuracy", "Wrong"]
    assert together == pytest.approx(alone, rel=1e-12)
    assert (together["accuracy"], together["Wrong"]) == (alone["accuracy"], alone["Wrong"])
    assert together["Wrong"] == round(360 * (1 - together["accuracy"]))
    assert len(set(control.allgather(repr(together).encode()))) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.filterwarnings("ignore:Metric .* will save all targets")
@pytest.mark.parametrize("kind", ["R2Score", "ExplainedVariance", "SpearmanCorrCoef"])
def test_workers_without_samples_follow_the_states_of_the_others(tensors, control, kind, dtype):
    torchmetrics = pytest.importorskip("torchmetrics")
    outputs = torch.tensor([[0.5, 2.0], [1.0, 4.0], [1.5, 9.0], [3.0, 2.5]], dtype=dtype)
    targets = torch.tensor([[1.0, 2.0], [0.5, 5.0], [2.5, 8.0], [3.5, 2.0]], dtype=dtype)
    if kind == "SpearmanCorrCoef":
        outputs, targets = outputs[:, 0], targets[:, 0]

    def results(has_samples, collectives):
        metric = getattr(torchmetrics, kind)()
        combined = StateMetric("own", metric, (None, None), None)
        combined.begin(torch.device("cpu"))
        if has_samples:
            combined.update(outputs, targets)
        combined.combine(collectives)
        return combined.result()

    expected = results(True, SoloCollectives())
    for busy in range(control.size):
        assert results(control.rank == busy, tensors) == expected
