"""Installs libraries of models and data sets beside the environment: python install.py FOLDER.

    PYTHONPATH=FOLDER/site-packages    `datasets` pickles pyarrow, and fails, where the folder has another name

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
# The package index gives a torchvision that is built for CUDA. Its operators do not load beside a torch that is built for a CPU, and then
# it can be imported only where the two that it refers to are declared. The models and data sets that are tested use neither.
DECLARATIONS = """

if not _has_ops():  # added by hvdlarge's tests/ecosystem/install.py
    for _name in ("nms", "qnms"):
        _arguments = "(Tensor dets, Tensor scores, float iou_threshold)"
        torch.library.define(f"torchvision::{_name}", f"{_arguments} -> Tensor")
"""


def install(folder: Path) -> None:
    """Install everything; a folder that was finished before is left as it is."""
    torch, numpy = version("torch"), version("numpy")
    on_torch = [*ON_TORCH, fitting_torchvision(torch)]
    finished = folder / "finished.txt"
    wanted = f"torch {torch}, numpy {numpy}: {[*PLAIN, *on_torch]}\n"
    if finished.exists() and finished.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    packages = folder / "site-packages"
    packages.mkdir(parents=True)
    # Before anything is installed: the folder may be on PYTHONPATH already
    environment = {(found.name, found.version) for found in distributions()}
    constraints = folder / "constraints.txt"
    constraints.write_text(f"numpy=={numpy}\n")
    pip(packages, "--constraint", str(constraints), *PLAIN)
    pip(packages, "--no-deps", "--no-build-isolation", *on_torch)
    with (packages / "torchvision/extension.py").open("a") as extension:
        extension.write(DECLARATIONS)
    for found in distributions(path=[str(packages)]):
        if NEVER.match(found.name.lower()) or (found.name, found.version) in environment:
            remove(found)
    finished.write_text(wanted)


def fitting_torchvision(torch: str) -> str:
    """The torchvision that is built for a release of torch: 0.28 for 2.13, 0.29 for 2.14."""
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
