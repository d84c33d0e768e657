"""`python -m hvdlarge.export`: weights of a run for programs that know nothing of it."""

import subprocess
import sys

import pytest
import torch
from support.launching import ROOT

import hvdlarge
from hvdlarge import export

JOB = {
    "name": "trained",
    "epochs": 2,
    "data": {"name": "parallel.own_parts:plain"},
    "model": {"name": "parallel.own_parts:Tied"},
    "batch": {"base": 8, "micro": 4},
    "lr": {"base": 0.5},
    "ema": {"half_life_samples": 50},
    "checkpoint": {"every_steps": 5, "keep": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder that holds runs/trained and runs/plain."""
    folder = tmp_path_factory.mktemp("export")
    for name in ("trained", "plain"):
        job = {key: value for key, value in JOB.items() if name == "trained" or key != "ema"}
        hvdlarge.run_job(job | {"name": name, "run_dir": str(folder / "runs" / name)})
    return folder


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """A copy of the runs, in the current folder."""
    subprocess.run(["cp", "-a", trained / "runs", tmp_path], check=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "trained"


def checkpoint(run, name="last.pt"):
    return torch.load(run / "checkpoints" / name, weights_only=True)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], v) for k, v in other.items())


@pytest.mark.parametrize(
    ("options", "entry", "name"),
    [
        ([], "model", "last.pt"),
        (["--last"], "model", "last.pt"),
        (["--best"], "model", "best.pt"),
        (["--ema"], "ema", "last.pt"),
        (["--ema", "--best"], "ema", "best.pt"),
        (["--step", "10"], "model", "step_000000010.pt"),
    ],
)
def test_weights_and_what_they_are(run, options, entry, name, capsys):
    assert export.main([str(run), "--output", "w.pt", *options]) == 0
    written, expected = torch.load("w.pt", weights_only=True), checkpoint(run, name)
    assert same(written["model"], expected[entry])
    assert written["metadata"] == {
        "format": "pt",
        "job": "trained",
        "weights": "averaged" if "--ema" in options else "plain",
        "step": str(expected["progress"]["step"]),
        "samples_seen": str(expected["progress"]["samples_seen"]),
    }
    assert f"w.pt: {len(expected[entry])} {written['metadata']['weights']} tensors of " in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("ema", [False, True])
def test_safetensors_with_tied_weights_in_the_run_folder(run, ema):
    from_file = pytest.importorskip("safetensors.torch").load_file
    assert export.main(["trained", *["--ema"][: int(ema)]]) == 0  # by its name in runs/
    name = "weights_ema.safetensors" if ema else "weights.safetensors"
    assert same(from_file(run / name), checkpoint(run)["ema" if ema else "model"])


def test_an_export_is_where_another_run_can_start(run):
    assert export.main(["trained", "--ema", "--output", "w.pt"]) == 0
    hvdlarge.run_job(JOB | {"name": "next", "init_from": "w.pt"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nothing"], "nothing: no run folder"),
        (["plain", "--ema", "--output", "w.pt"], "holds no averaged weights"),
        (["trained", "--step", "3", "--output", "w.pt"], "has no step_000000003.pt; it has step_0"),
        (["trained", "--output", "w.bin"], "must end with .safetensors or .pt"),
        (["trained", "--output", "there.pt"], "it exists already; --force replaces it"),
        (["trained", "--output", "none/w.pt"], "its folder does not exist"),
    ],
)
def test_mistakes_are_told(run, options, message, capsys):
    (run.parents[1] / "there.pt").write_bytes(b"before")
    assert export.main(options) == 2
    assert message in capsys.readouterr().err
    assert (run.parents[1] / "there.pt").read_bytes() == b"before"


def test_force_replaces_a_file(run):
    (run.parents[1] / "w.pt").write_bytes(b"before")
    assert export.main(["trained", "--output", "w.pt", "--force"]) == 0
    assert "model" in torch.load("w.pt", weights_only=True)


def test_a_run_without_a_checkpoint(run, capsys):
    for file in (run / "checkpoints").iterdir():
        file.unlink()
    assert export.main(["trained", "--output", "w.pt"]) == 2
    assert "has no checkpoint yet" in capsys.readouterr().err
    assert export.main(["trained", "--best", "--output", "w.pt"]) == 2
    assert "has no best.pt; it has no checkpoint" in capsys.readouterr().err


def damage(path):
    """Change a byte of a tensor, in this file and in those that are linked to it."""
    raw = bytearray(path.read_bytes())
    place = raw.index(
        torch.load(path, weights_only=True)["model"]["first.weight"].numpy().tobytes()
    )
    raw[place] ^= 1
    with path.open("r+b") as file:
        file.write(raw)


def test_a_damaged_checkpoint_is_refused(run, capsys):
    newest, before = sorted((run / "checkpoints").glob("step_*.pt"), reverse=True)[:2]
    damage(newest)
    assert export.main(["trained", "--step", str(int(newest.stem[5:])), "--output", "w.pt"]) == 77
    assert "its SHA-256 differs" in capsys.readouterr().err
    assert export.main(["trained", "--output", "w.pt"]) == 0  # as a resume, from the one before
    told = capsys.readouterr().out
    assert f"skipped runs/trained/checkpoints/{newest.name}: damaged" in told
    assert before.name in told
    damage(run / "checkpoints" / "best.pt") if newest.stat().st_ino != (
        run / "checkpoints" / "best.pt"
    ).stat().st_ino else None
    assert export.main(["trained", "--best", "--output", "b.pt"]) == 77
    assert "damaged" in capsys.readouterr().err


def test_a_full_disk_is_told(run, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert export.main(["trained", "--output", "w.pt"]) == 74
    assert "w.pt could not be written (No space left on device)" in capsys.readouterr().err


def test_it_works_without_horovod_and_mpi(run):
    blocked = "import sys\nfor name in ('horovod', 'mpi4py'): sys.modules[name] = None\n"
    work = "from hvdlarge.export import main\nsys.exit(main(['trained', '--output', 'w.pt']))"
    done = subprocess.run(
        [sys.executable, "-c", blocked + work],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
