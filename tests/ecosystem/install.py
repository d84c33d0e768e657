"""Installs libraries of models and data sets beside the environment: python install.py FOLDER.

    FOLDER/site-packages    on PYTHONPATH; `datasets` pickles pyarrow, and fails, where the folder has another name
    FOLDER/torchvision      on the search path where it can be imported, see torchvision_part.py

The environment is not changed, and its torch and numpy stay the ones that are imported: neither may come along, and what the
environment has in the same version is removed again. torchvision is built for one release of torch, so the one that fits is asked for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import Distribution, distributions, version
from pathlib import Path

PLAIN = ["transformers", "datasets", "pillow"]  # they do not depend on torch
ON_TORCH = ["timm", "efficientnet_pytorch"]  # installed without what they depend on
NEVER = re.compile(r"(torch|numpy|triton|nvidia-.*|cuda-.*)$")


def install(folder: Path) -> None:
    """Install everything; a folder that was finished before is left as it is."""
    finished = folder / "finished.txt"
    wanted = f"torch {version('torch')}, numpy {version('numpy')}: {PLAIN + ON_TORCH}\n"
    if finished.exists() and finished.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    packages = folder / "site-packages"
    packages.mkdir(parents=True)
    constraints = folder / "constraints.txt"
    constraints.write_text(f"numpy=={version('numpy')}\n")
    pip(packages, "--constraint", str(constraints), *PLAIN)
    pip(packages, "--no-deps", "--no-build-isolation", *ON_TORCH)
    for found in distributions(path=[str(packages)]):
        if NEVER.match(found.name.lower()) or is_in_environment(found):
            remove(found)
    try:
        pip(folder / "torchvision", "--no-deps", fitting_torchvision(version("torch")))
    except (ValueError, subprocess.CalledProcessError):
        print(f"no torchvision for torch {version('torch')} and this Python: tests are skipped")
    finished.write_text(wanted)


def fitting_torchvision(torch: str) -> str:
    """The torchvision that is built for a release of torch: 0.N+15 for 2.N.

    >>> fitting_torchvision("2.13.0+cpu")
    'torchvision==0.28.*'
    """
    major, minor = torch.split(".")[:2]
    if major != "2":
        raise ValueError(f"no torchvision is known for torch {torch}")
    return f"torchvision==0.{int(minor) + 15}.*"


def pip(folder: Path, *what: str) -> None:
    quiet = ["--disable-pip-version-check", "--quiet"]
    command = [sys.executable, "-m", "pip", "install", *quiet, "--target", str(folder), *what]
    # Without PYTHONPATH, which may hold an earlier folder
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environment)


def is_in_environment(found: Distribution) -> bool:
    try:
        return version(found.name) == found.version
    except ImportError:
        return False


def remove(found: Distribution) -> None:
    for file in found.files or []:
        path = Path(found.locate_file(file))
        path.unlink(missing_ok=True)
        if not path.parent.exists():
            continue
        shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
        while not any(path.parent.iterdir()):
            path = path.parent
            path.rmdir()


if __name__ == "__main__":
    install(Path(sys.argv[1]).absolute())
