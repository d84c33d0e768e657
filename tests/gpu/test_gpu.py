"""What the suites for any device assert, once more where tensors live on a GPU, and what only a GPU can show."""

import json
import subprocess
import sys

import pytest
from support import quadratic
from support.comparing import distance, same
from support.launching import MPIRUN, ROOT

FP64 = "precision=fp64"


def summary(bench, name="runs/faults"):
    return json.loads((bench.run_folder(name) / "summary.json").read_text())


def test_the_doctor_finds_gpu_and_horovod_fit():
    import horovod.torch as hvd

    done = subprocess.run(
        [sys.executable, "-m", "hvdlarge.doctor"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    line = next(line for line in done.stdout.splitlines() if " GPUs: " in line)
    assert line.startswith("ok" if hvd.nccl_built() else "warning"), line


def test_the_main_job_learns_alone_and_under_mpirun(bench):
    job = str(ROOT / "jobs/digits.yaml")
    for name, launch in (("alone", []), ("mpirun", [*MPIRUN, "-np", "1"])):
        command = [*launch, sys.executable, "-m", "hvdlarge.train", job]
        ended = bench.end(bench.begin_command([*command, f"run_dir=runs/{name}", FP64]))
        assert ended.code == 0, ended.text
        assert summary(bench, f"runs/{name}")["accuracy"] >= 0.98
    assert distance(bench.checkpoint("runs/alone"), bench.checkpoint("runs/mpirun")) < 1e-9


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_every_precision_learns(bench, precision):
    ended = bench.begin_command(
        [sys.executable, "-m", "hvdlarge.train", str(ROOT / "jobs/digits.yaml")]
        + [f"precision={precision}", "run_dir=runs/it", "model.channels_last=true"]
    )
    ended = bench.end(ended)
    assert ended.code == 0, ended.text
    assert summary(bench, "runs/it")["accuracy"] >= 0.97
    assert summary(bench, "runs/it")["peak_memory_bytes"] > 0


def test_a_compiled_model_learns(bench):
    ended = bench.begin_command(
        [sys.executable, "-m", "hvdlarge.train", str(ROOT / "jobs/digits.yaml")]
        + ["model.compile=true", "run_dir=runs/it"]
    )
    ended = bench.end(ended)
    assert ended.code == 0, ended.text
    assert summary(bench, "runs/it")["accuracy"] >= 0.97


def test_workers_that_share_the_gpu_give_the_same_result(sharing, bench, undisturbed):
    alone = undisturbed(1, FP64)
    for workers in (2, 3):
        assert distance(undisturbed(workers, FP64), alone) < 1e-9
    ended = bench.run(2, FP64)
    assert "they take turns on it" in ended.text


def test_exact_mode_is_bit_identical(sharing, undisturbed):
    alone = undisturbed(1, "reduction=exact")
    assert same(undisturbed(2, "reduction=exact"), alone)
    assert same(undisturbed(4, "reduction=exact"), alone)


@pytest.mark.parametrize("fault", ["usr1", "term"])
def test_a_stopped_run_goes_on_identically(bench, undisturbed, fault):
    assert bench.run(1, "reduction=exact", FAULT=f"{fault}@0:61").code == 75
    assert bench.run(1, "reduction=exact").code == 0
    assert same(bench.checkpoint(), undisturbed(1, "reduction=exact"))


def test_a_stopped_run_of_two_goes_on_with_one(sharing, bench, undisturbed):
    assert bench.run(2, FP64, FAULT="term@1:33").code == 75
    assert bench.run(1, FP64).code == 0
    assert distance(bench.checkpoint(), undisturbed(1, FP64)) < 1e-9


def test_a_killed_run_goes_on_identically(sharing, bench, undisturbed):
    ended = bench.run(2, "reduction=exact", FAULT="kill@1:33")
    assert ended.fired
    assert ended.code not in (0, 75)
    assert bench.run(2, "reduction=exact").code == 0
    assert same(bench.checkpoint(), undisturbed(1, "reduction=exact"))


def test_a_non_finite_value_stops_the_run(bench):
    ended = bench.run(1, FAULT="nan@0:51")
    assert ended.fired
    assert ended.code == 73, ended.text
    assert len(ended.errors) == 1
    assert "is not finite at step" in ended.errors[0]
    assert bench.has_checkpoint()


def test_an_overflow_halves_the_loss_scale(bench):
    assert bench.run(1, "precision=fp16", FAULT="inf@0:51").code == 0
    assert bench.checkpoint()["state"]["skipped"] >= 1


def test_the_largest_micro_batch_is_found(bench):
    ended = bench.run(1, "batch.micro=auto")
    assert ended.code == 0, ended.text
    assert "batch.micro is auto: no micro-batch is larger than" in ended.text


def test_memory_that_runs_out_is_reported_with_what_to_change(own_parts):
    ended = own_parts.run(1, "model={name: 'gpu_parts:Crowded', args: {at_pass: 51}}")
    assert ended.code == 70, ended.text
    assert "Traceback" not in ended.text
    assert len(ended.errors) == 1
    assert "out of memory in step" in ended.errors[0]
    assert "batch.micro lower" in ended.errors[0]


def test_a_label_that_no_class_has_is_named(own_parts):
    """The GPU reports it late, as a failed assertion of its own."""
    ended = own_parts.run(1, "data={name: 'gpu_parts:data', args: {wrong: 700}}")
    assert ended.code == 70, ended.text
    assert len(ended.errors) == 1, ended.text
    assert "a class index in the targets" in ended.errors[0]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_processes_change_nothing(own_parts, undisturbed, num_workers):
    data = f"data={{name: 'gpu_parts:data', num_workers: {num_workers}}}"
    assert own_parts.run(1, "reduction=exact", data).code == 0
    assert same(own_parts.checkpoint(), undisturbed(1, "reduction=exact"))


@pytest.mark.parametrize(
    "loss", ["{name: cross_entropy}", "{name: cross_entropy, args: {ignore_index: 3}}"]
)
def test_targets_of_two_dimensions_train_in_exact_mode(own_parts, loss):
    """For which torch has no deterministic algorithm on a GPU."""
    overrides = ("model={name: 'gpu_parts:Pairs'}", "data={name: 'gpu_parts:data_of_pairs'}")
    ended = own_parts.run(1, "reduction=exact", *overrides, f"loss={loss}")
    assert ended.code == 0, ended.text


def test_measurements_are_those_of_a_cpu(sharing, bench):
    """Norms by layer, gradient noise, distances, and the growths that follow the noise."""
    source = ROOT / "tests/support/quadratic.py"
    (bench.folder / "quadratic.py").write_text(source.read_text())
    (bench.folder / "quadratic.yaml").write_text(quadratic.JOB.replace("support.", ""))
    train = [sys.executable, "-m", "hvdlarge.train", "quadratic.yaml"]
    for name, launch, visible in (
        ("cpu", [], {"CUDA_VISIBLE_DEVICES": ""}),
        ("gpu", [], {}),
        ("two", [*MPIRUN, "-np", "2"], {}),
    ):
        ended = bench.end(bench.begin_command([*launch, *train, f"run_dir=runs/{name}"], **visible))
        assert ended.code == 0, ended.text
    cpu, *others = (bench.run_folder(f"runs/{name}") for name in ("cpu", "gpu", "two"))
    expected = quadratic.comparable(cpu)
    assert sum("noise_scale" in line for line in expected) >= 3
    for folder in others:
        assert (folder / "decisions.jsonl").read_text() == (cpu / "decisions.jsonl").read_text()
        for line, other in zip(quadratic.comparable(folder), expected, strict=True):
            assert line == pytest.approx(other, rel=1e-9, abs=1e-12)
