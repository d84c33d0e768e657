"""A run before it is started: its figures against the controller's, what it refuses, and the door that prints it."""

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest
import torch
from support.launching import ROOT

from hvdlarge.config.job_file import parse_job, read_job
from hvdlarge.config.planning import (
    UnknownSamples,
    checkpoints_of,
    curve_of,
    estimate,
    plan_run,
    training_samples,
)
from hvdlarge.config.registry import training_samples as built_in_samples
from hvdlarge.controller import Controller
from hvdlarge.data.digits import digits
from hvdlarge.data.synthetic import synthetic_images
from hvdlarge.exits import JobError
from hvdlarge.plan import main
from hvdlarge.reporting.describe import notes
from hvdlarge.schedule.growth import AdaBatchGrowth
from hvdlarge.schedule.progress import milestones_reached
from hvdlarge.train import main as train

IMAGENET = """\
name: imagenet
epochs: 90
data: {name: "mine:imagenet", samples: 1281167}
model: {name: "mine:resnet50"}
batch: {base: 1024, initial: 32768, micro: 64}
lr: {base: 5.656854249492381, scaling: sqrt, warmup: {policy: legw, epochs: 0.3125}, decay: {policy: polynomial}}
optimizer: {weight_decay: 1e-4}
"""
SHIPPED = sorted(path.name for path in (ROOT / "jobs").glob("*.yaml"))


def test_the_built_in_data_sets_have_the_sizes_that_a_plan_counts_with():
    assert built_in_samples("digits", {}) == len(digits()[0])
    assert (
        built_in_samples("synthetic_images", {"samples": 700})
        == len(synthetic_images(700)[0])
        == 700
    )
    for name, samples in {"mnist": 60_000, "cifar10": 50_000, "cifar100": 50_000}.items():
        assert built_in_samples(name, {"folder": "anywhere"}) == samples
        assert built_in_samples(name, {"samples": 50}) == 50
    assert built_in_samples("npy", {"folder": "anywhere"}) is None
    assert built_in_samples("digits", {"samples": 3}) is built_in_samples("mine:data", {}) is None


@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_estimate_holds_the_sums_of_the_controllers_decisions(name, world_size):
    job = read_job(str(ROOT / "jobs" / name))
    plan = plan_run(job, 1437, world_size)
    estimated, decisions = estimate(job, plan, None), list(iter(Controller(plan).decide, None))
    assert estimated["steps"] == len(decisions)
    assert estimated["samples"] == sum(decision.global_batch for decision in decisions)
    for row, (_, group) in zip(
        estimated["stages"],
        itertools.groupby(decisions, lambda decision: decision.stage),
        strict=True,
    ):
        steps = list(group)
        assert (row["steps"], row["samples"]) == (
            len(steps),
            sum(decision.global_batch for decision in steps),
        )
        assert (row["lr_first"], row["lr_last"]) == (steps[0].lr, steps[-1].lr)


@pytest.mark.parametrize("cadence", ["{every_epochs: 1}", "{every_epochs: 0.7}", "{every_epochs: 0.01}", "{every_steps: 7}",
    "{every_steps: 1}", "{every_epochs: 0.5, every_steps: 10}", "{every_epochs: 0.02, every_steps: 3}", "{every_minutes: 1}"])  # fmt: skip
def test_checkpoints_are_counted_as_the_run_writes_them(cadence):
    job = read_job(str(ROOT / "jobs/digits.yaml"), [f"checkpoint={cadence}", "epochs=13.3"])
    plan = plan_run(job, 1437, 2)
    written = dict.fromkeys(range(len(plan.stages)), 0)
    for decision in iter(Controller(plan).decide, None):
        epochs = [
            plan.clock.epoch(decision.samples_seen + more) for more in (0, decision.global_batch)
        ]
        every = job.checkpoint.epochs
        due = decision.is_last or (
            every
            and milestones_reached(epochs[1], every, None)
            > milestones_reached(epochs[0], every, None)
        )
        steps = job.checkpoint.every_steps
        written[decision.stage] += bool(due or (steps and (decision.step + 1) % steps == 0))
    assert checkpoints_of(job.checkpoint, plan.stages, plan.clock) == list(written.values())


def test_the_curve_goes_through_the_controllers_decisions():
    plan = plan_run(read_job(str(ROOT / "jobs/digits.yaml")), 1437, 2)
    decided = {
        decision.epoch: (decision.global_batch, decision.lr)
        for decision in iter(Controller(plan).decide, None)
    }
    points = curve_of(plan)
    assert len(points) > 300
    assert points == sorted(points)
    for epoch, batch, lr in points[:-1]:
        assert decided[epoch] == (batch, lr)


def test_the_fingerprint_is_the_schedules_and_not_the_clusters():
    job = read_job(str(ROOT / "jobs/digits.yaml"))
    prints = {plan_run(job, 1437, workers).fingerprint() for workers in (1, 2, 64)}
    assert len(prints) == 1
    other = read_job(str(ROOT / "jobs/digits.yaml"), ["lr.base=4.000001"])
    assert plan_run(other, 1437, 1).fingerprint() not in prints
    assert dataclasses.replace(plan_run(job, 1437, 1), micro_batch=8).fingerprint() not in prints


def test_imagenet_comes_out_as_legw_says():
    estimated = estimate(
        parse_job(IMAGENET, "imagenet"),
        plan_run(parse_job(IMAGENET, "imagenet"), 1281167, 64),
        None,
    )
    assert (
        estimated["steps"],
        estimated["steps_at_the_base_batch"],
        estimated["warmup_epochs"],
    ) == (
        3519,
        112603,
        10.0,
    )
    assert estimated["stages"][0]["lr_highest"] == pytest.approx(32, rel=1e-4)
    assert estimated["stages"][0]["equation"] == "32768 = 64 × 8 × 64"


def test_the_samples_of_an_own_data_set_are_unknown_where_the_job_does_not_say_them():
    job = parse_job(IMAGENET.replace(", samples: 1281167", ""), "imagenet")
    with pytest.raises(UnknownSamples, match=r"data\.samples: a plan does not load mine:imagenet"):
        training_samples(job)
    assert training_samples(parse_job(IMAGENET, "imagenet")) == 1281167


@pytest.mark.parametrize("world_size", [64, 4096])
def test_the_door_needs_no_torch_horovod_or_mpi(world_size, tmp_path):
    (tmp_path / "imagenet.yaml").write_text(IMAGENET)
    blocked = (
        "import sys\n"
        "for name in ('torch', 'horovod', 'mpi4py'): sys.modules[name] = None\n"
        "from hvdlarge.plan import main\n"
        f"sys.exit(main(['imagenet.yaml', '--world-size', '{world_size}', '--json']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", blocked], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    estimated = json.loads(done.stdout)
    assert (estimated["world_size"], estimated["steps"]) == (world_size, 3519)
    assert estimated["stages"][0]["idle_workers"] == max(0, world_size - 512)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "no such job file"),
        ([], "name a job file"),
        (["JOB", "--world-size", "0"], "at least one worker"),
        (["JOB", "--samples", "0"], "at least one sample"),
        (["JOB", "reduction=exact", "--world-size", "3"], "exact needs 1, 2, 4, 8"),
        (["JOB", "data.name=mine:data"], "data.samples: mine:data cannot be built here to count its samples (data.name: there is no module 'mine'"),
        (["JOB", "lr.bas=3"], "unknown key 'lr.bas'"),
        (["JOB", "--measured", "nowhere"], "not the folder of a finished run"),
        (["JOB", "--plot", "nowhere/there.png"], "--plot"),
        (["JOB", "--plot", "there.abc"], "--plot"),
        (["JOB", "--decisions", "nowhere/there"], "--decisions"),
        (["JOB", "epochs=1e18"], "longer than can be counted"),
    ],
)  # fmt: skip
def test_what_cannot_be_planned_is_refused(arguments, message, capsys):
    assert (
        main([str(ROOT / "jobs/digits.yaml") if word == "JOB" else word for word in arguments]) == 2
    )
    assert message in capsys.readouterr().err


def test_a_plan_in_words_and_side_by_side(capsys):
    arguments = [
        str(ROOT / "jobs/digits.yaml"),
        "--world-size",
        "2",
        "--compare",
        str(ROOT / "jobs/digits_lstm.yaml"),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "512 = 16 × 16 × 2" in said
    assert "524, 2.57 × fewer than the 1,348 of a fixed batch of 32" in said
    assert "model.name                   convnet           row_lstm" in said


@pytest.mark.parametrize(
    ("changes", "is_said"),
    [
        (["loss.args={ignore_index: -1}"], False),
        (
            [
                "loss={name: 'torch.nn:NLLLoss', args: {ignore_index: 0}}",
                "batch.growth={policy: none}",
            ],
            True,
        ),
        (["loss={name: 'mine:loss', args: {ignore_index: 0}}"], False),
        (["loss.args={ignore_index: -1}", "batch.growth={policy: none}", "batch.micro=32"], False),
        ([], False),
    ],
)
def test_that_ignored_targets_count_by_micro_batch_is_said_where_a_step_has_several(
    changes, is_said, capsys
):
    assert main([str(ROOT / "jobs/digits.yaml"), *changes]) == 0
    assert ("note     loss.args.ignore_index: " in capsys.readouterr().out) == is_said


def test_a_first_batch_below_the_base_takes_more_steps(capsys):
    assert main([str(ROOT / "jobs/digits_lstm.yaml"), "batch.base=1024", "lr.warmup.epochs=1"]) == 0
    assert "× more than the 127 of a fixed batch of 1024" in capsys.readouterr().out


def test_the_jobs_to_compare_may_be_shipped_ones_by_name(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["digits", "--compare", "digits_lstm"]) == 0
    assert "saved    30 checkpoints" in capsys.readouterr().out


def test_one_checkpoint_is_not_several(capsys):
    assert main([str(ROOT / "jobs/digits.yaml"), "checkpoint.every_epochs=30"]) == 0
    assert "saved    1 checkpoint at" in capsys.readouterr().out


def test_a_legw_warmup_without_its_length_is_noted(capsys):
    assert main([str(ROOT / "jobs/digits.yaml"), "lr.warmup={policy: legw}"]) == 0
    assert "note     lr.warmup.epochs is 0: there is no warmup" in capsys.readouterr().out


def test_a_micro_batch_of_one_sample_is_noted_where_batches_are_normalised():
    words = "a micro-batch of one sample"
    model = torch.nn.BatchNorm1d(4)
    for changes, noted in (
        (["batch.micro=1"], True),
        (["batch.base=33", "batch.growth.max=1000"], True),
        ([], False),
    ):
        plan = plan_run(read_job(str(ROOT / "jobs/digits.yaml"), changes), 1437, 2)
        assert any(words in line for line in notes(plan, model)) == noted, changes
        assert not any(words in line for line in notes(plan, torch.nn.Linear(4, 4)))


class Shrinking(AdaBatchGrowth):
    """Half the batch from the second epoch on."""

    def next_batch(self, initial, current, epoch, measured):
        """Shrinks."""
        return initial if epoch < 1 else initial // 2


def test_a_growth_that_shrinks_is_refused():
    job = read_job(str(ROOT / "jobs/digits.yaml"), [])
    growth = Shrinking(every_epochs=1)
    shrinking = job.model_copy(update={"batch": job.batch.model_copy(update={"growth": growth})})
    with pytest.raises(JobError, match=r"^batch.growth: Shrinking gives a batch of 16 after 32"):
        plan_run(shrinking, 1437, 2)


def test_a_plan_is_drawn(tmp_path):
    job = str(ROOT / "jobs/digits.yaml")
    for name, begins in (("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml"), ("plan.pdf", b"%PDF")):
        assert main([job, "--plot", str(tmp_path / name)]) == 0
        assert (tmp_path / name).read_bytes().startswith(begins)


def test_figures_of_a_measured_run_give_time_memory_and_disk(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    summary = {"samples_per_second": 4000.0, "world_size": 2, "peak_memory_bytes": 300 * 2**20}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "job.resolved.yaml").write_text("batch: {micro: 16}\n")
    (run / "checkpoints/last.pt").write_bytes(bytes(2**20))
    assert main([str(ROOT / "jobs/digits.yaml"), "--world-size", "4", "--measured", str(run)]) == 0
    said = capsys.readouterr().out
    assert "300 MiB a worker, as measured with micro-batches of 16" in said
    assert "4.0 MiB for 3 checkpoints and the best" in said
    job = read_job(str(ROOT / "jobs/digits.yaml"))
    seconds = sum(
        -(-decision.global_batch // 64) * 16 / 2000
        for decision in iter(Controller(job.plan(1437, 4)).decide, None)
    )
    assert (
        main(
            [str(ROOT / "jobs/digits.yaml"), "--world-size", "4", "--measured", str(run), "--json"]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["seconds"] == pytest.approx(seconds, rel=0.01)
    assert main([str(ROOT / "jobs/digits.yaml"), "batch.micro=8", "--measured", str(run)]) == 0
    assert "not measured with this micro-batch" in capsys.readouterr().out


def test_a_measured_run_of_another_job_is_noted_key_by_key(tmp_path, capsys):
    digits = str(ROOT / "jobs/digits.yaml")
    job = read_job(digits, ["model.args={width: 8}", "precision=bf16", "data.num_workers=2"])
    (tmp_path / "job.resolved.yaml").write_text(job.to_yaml())
    (tmp_path / "summary.json").write_text(
        json.dumps({"samples_per_second": 4000.0, "world_size": 2})
    )
    changed = [digits, "model={name: mlp}", "data.name=synthetic_images", "data.args.samples=900"]
    changed += ["batch.micro=8", "--measured", str(tmp_path)]
    assert main(changed) == 0
    notes = [
        line.split("; ")[0].removeprefix("note     --measured: ")
        for line in capsys.readouterr().out.splitlines()
        if "--measured" in line
    ]
    assert notes == [
        "data.name is digits in the measured run and synthetic_images in this job",
        "data.args is {} in the measured run and {'samples': 900} in this job",
        "data.num_workers is 2 in the measured run and 0 in this job",
        "model.name is convnet in the measured run and mlp in this job",
        "model.args is {'width': 8} in the measured run and {} in this job",
        "precision is bf16 in the measured run and fp32 in this job",
        "batch.micro is 16 in the measured run and 8 in this job",
    ]
    assert main([*changed, "--json"]) == 0
    differs = json.loads(capsys.readouterr().out)["measured_differs"]
    assert differs == [note.split()[0] for note in notes]
    same = ["model.args={width: 8}", "precision=bf16", "data.num_workers=2", "lr.base=3"]
    assert main([digits, *same, "--measured", str(tmp_path)]) == 0
    assert "--measured" not in capsys.readouterr().out


OWN_SET = """
print("reading the files")

def data(size=700, readable=True):
    if not readable:
        raise FileNotFoundError("no folder of images here")
    return [([0.0], 0)] * size, None
"""


@pytest.fixture
def own_set(tmp_path, monkeypatch):
    (tmp_path / "counted_parts.py").write_text(OWN_SET)
    digits = (ROOT / "jobs/digits.yaml").read_text()
    (tmp_path / "job.yaml").write_text(digits)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield [str(tmp_path / "job.yaml"), "data.name=counted_parts:data"]
    sys.modules.pop("counted_parts", None)


def test_an_own_data_set_beside_the_job_is_built_to_count_its_samples(own_set, capsys):
    assert main(own_set) == 0
    said = capsys.readouterr()
    assert "30 epochs of 700 samples" in said.out
    assert "note     counted_parts:data was built to count its 700 samples" in said.out
    assert said.err == "reading the files\n"
    assert main([*own_set, "data.args.size=600", "--json"]) == 0
    estimated = json.loads(capsys.readouterr().out)
    assert (estimated["training_samples"], estimated["data_set_built"]) == (600, True)
    assert main([*own_set, "data.samples=500"]) == 0
    assert "was built" not in capsys.readouterr().out


def test_jobs_are_not_compared_by_the_parts_of_one_of_them(own_set, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "counted_parts.py").write_text(OWN_SET.replace("700", "300"))
    text = (
        (ROOT / "jobs/digits.yaml")
        .read_text()
        .replace("name: digits}", "name: 'counted_parts:data'}")
    )
    for folder in (tmp_path, other):
        (folder / "job.yaml").write_text(text)
    assert "counted_parts" in text
    assert main([own_set[0], "--compare", str(other / "job.yaml")]) == 2
    said = capsys.readouterr().err
    for folder in (tmp_path, other):
        assert str(folder / "counted_parts.py") in said


def test_samples_on_the_command_line_hold_for_both_jobs_and_come_first(capsys):
    job = str(ROOT / "jobs/digits.yaml")
    assert main([job, "--samples", "1000", "--compare", job, "--json"]) == 0
    estimates = json.loads(capsys.readouterr().out)
    assert [estimated["training_samples"] for estimated in estimates] == [1000, 1000]
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "training samples, whatever the jobs say" in " ".join(capsys.readouterr().out.split())


def test_a_dry_run_checks_the_schedule_of_an_own_data_set(own_set, capsys):
    assert train([*own_set, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# counted_parts:data was built: it has 700 samples\n")
    assert parse_job(shown, "shown").data.name == "counted_parts:data"
    assert train([*own_set, "--dry-run", "epochs=1e-9", "lr.warmup.policy=none"]) == 2
    assert "has no sample in it" in capsys.readouterr().err


def test_a_data_set_that_cannot_be_built_here_asks_for_data_samples(own_set, capsys):
    words = (
        "data.samples: counted_parts:data cannot be built here to count its samples (data.name: "
        "counted_parts:data raises FileNotFoundError: no folder of images here"
    )
    assert main([*own_set, "data.args.readable=false"]) == 2
    assert words in capsys.readouterr().err
    assert train([*own_set, "data.args.readable=false", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"# the schedule was not checked: {words}")
    assert parse_job(shown, "shown").data.name == "counted_parts:data"


def test_a_measured_run_whose_job_has_words_that_yaml_1_1_reads_as_dates_is_read(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("TOKEN", "of the machine that ran it")
    job = parse_job(IMAGENET, "imagenet", ["model.args={since: 2020-13-45, token: '${TOKEN}'}"])
    monkeypatch.delenv("TOKEN")
    (tmp_path / "job.resolved.yaml").write_text(job.to_yaml())
    (tmp_path / "summary.json").write_text(
        json.dumps({"samples_per_second": 4000.0, "world_size": 2})
    )
    code = main([str(ROOT / "jobs/digits.yaml"), "batch.micro=16", "--measured", str(tmp_path)])
    assert code == 0, capsys.readouterr().err


def test_what_cannot_run_is_refused():
    job = parse_job(IMAGENET, "imagenet", ["epochs=1e-9", "lr.warmup={policy: none}"])
    with pytest.raises(JobError, match="has no sample in it"):
        plan_run(job, 1281167, 1)
    with pytest.raises(JobError, match="the lr is inf in stage 0"):
        plan_run(
            parse_job(IMAGENET, "imagenet", ["lr.base=1e308", "lr.scaling=linear"]), 1281167, 1
        )
    with pytest.raises(JobError, match="not 3"):
        plan_run(read_job(str(ROOT / "jobs/digits.yaml"), ["reduction=exact"]), 1437, 3)
