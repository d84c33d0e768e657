"""The image of docker/Dockerfile, built and run without a Docker engine: by buildah, on a base that debootstrap makes.

Isolation is by chroot alone, so that it works within a container too. What this machine has set for pip and for certificates holds in the build.

    HVDLARGE_DOCKER_MOUNTS   more files and folders that the build needs to see, under the same path: separated by colons
    TORCH                    what pip installs as torch (default: the release and build of the tests' own torch)
    DEBIAN_RELEASE           of the base image (default: bookworm)
    DEBIAN_MIRROR            where debootstrap finds it (default: its own default)
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from support.launching import ROOT

PROGRAMS = ("buildah", "debootstrap", "unshare")
BASE = "localhost/hvdlarge-test-base"
IMAGE = "localhost/hvdlarge-test"


def find(program):
    """The path of a program, in the folders of the administrator too."""
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def missing():
    """Why no image can be built here; empty if one can."""
    absent = [program for program in PROGRAMS if find(program) is None]
    if absent:
        return f"{', '.join(absent)} not installed (Debian: {' '.join(PROGRAMS[:2])} util-linux)"
    return "" if os.geteuid() == 0 else "buildah with chroot isolation must be started by root here"


def buildah(*arguments, seconds=120):
    """Run buildah; what it printed, or AssertionError with the end of that."""
    done = subprocess.run(
        [find("buildah"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=seconds,
        cwd=ROOT,
        env=environ(),
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def environ():
    return {"STORAGE_DRIVER": "overlay", **os.environ, "BUILDAH_ISOLATION": "chroot"}


def base_image():
    """The name of a base image: Debian with what every installation has. It is made once and kept by buildah."""
    release = os.environ.get("DEBIAN_RELEASE", "bookworm")
    name = f"{BASE}:{release}"
    if buildah("images", "--quiet", "--filter", f"reference={name}"):
        return name
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        command = [find("debootstrap"), "--variant=minbase", release, tree]
        mirror = os.environ.get("DEBIAN_MIRROR")
        done = subprocess.run(
            [*command, *([mirror] if mirror else [])], capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        # As the slim images of Debian: without manuals, translations and the archives of what is installed
        for place in ("var/cache/apt", "var/lib/apt/lists", "usr/share/man", "usr/share/locale"):
            shutil.rmtree(tree / place)
        for place in (tree / "usr/share/doc").glob("*/*"):
            if place.name != "copyright":
                shutil.rmtree(place) if place.is_dir() else place.unlink()
        (tree / "var/lib/apt/lists/partial").mkdir(parents=True)
        (tree / "var/cache/apt/archives/partial").mkdir(parents=True)
        container = buildah("from", "scratch").strip()
        try:
            buildah("add", container, tree, "/")
            buildah("config", "--cmd", "bash", container)
            buildah("commit", container, name, seconds=600)
        finally:
            buildah("rm", container)
    return name


def pip_settings(folder):
    """Write all of pip's settings here, from files and the environment, into one file; returns it, and the local files that they name."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    settings = dict(re.findall(r"^(?:global|install|user|:env:)\.([\w-]+)='(.*)'$", listed, re.M))
    settings = {name: value.replace(r"\n", "\n") for name, value in settings.items()}
    # The image's own bundle, made from the certificates below
    settings.pop("cert", None)
    file = folder / "pip.conf"
    lines = [f"{name} = {' '.join(value.split())}" for name, value in settings.items()]
    file.write_text("\n".join(["[global]", *lines]) + "\n")
    places = set()
    for word in " ".join(settings.values()).split():
        place = Path(word.removeprefix("file://"))
        if place.is_absolute() and place.exists():
            # The pages of a local index name archives that lie beside it
            places.add(place.parent if word.startswith("file://") else place)
    return file, sorted(places)


def mounts(folder):
    """The options of buildah for what the build needs of this machine."""
    file, places = pip_settings(folder)
    # Certificates that the administrator has added; Debian's package takes them into its bundle
    places.append(Path("/usr/local/share/ca-certificates"))
    places.extend(map(Path, filter(None, os.environ.get("HVDLARGE_DOCKER_MOUNTS", "").split(":"))))
    pairs = [(file, "/etc/pip.conf"), *((place, place) for place in places if place.exists())]
    return [option for source, target in pairs for option in ("-v", f"{source}:{target}:ro")]


def build(folder, dockerfile="docker/Dockerfile", name=IMAGE, **arguments):
    """Build an image; returns its name. Steps that were built before are not built again."""
    arguments = {
        "BASE_IMAGE": base_image(),
        "TORCH": os.environ.get("TORCH", f"torch=={torch.__version__}"),
        **arguments,
    }
    options = [
        word for key, value in arguments.items() for word in ("--build-arg", f"{key}={value}")
    ]
    command = ["bud", "--layers", *mounts(folder), "-f", dockerfile, "-t", name, *options, "."]
    buildah(*command, seconds=3600)
    return name


def inspect(name):
    """What an image says about itself."""
    return json.loads(buildah("inspect", "--type", "image", name))


def size(name):
    """The size of an image in megabytes (of a million bytes)."""
    (found,) = json.loads(buildah("images", "--json", "--filter", f"reference={name}"))
    number, unit = found["size"].split()
    return float(number) * {"kB": 1e-3, "MB": 1, "GB": 1e3}[unit]


class Container:
    """A context manager: a container of an image, which runs commands as the image's user, through its entry point."""

    def __init__(self, image):
        self.image = image

    def __enter__(self):
        self.name = buildah("from", self.image).strip()
        return self

    def __exit__(self, *_):
        buildah("rm", self.name)

    def command(self, *arguments, mounts=(), environ=None, host=None):
        """The command line; `mounts` are pairs of a place here and a place there, `host` is a support.hosts.Host to run on."""
        config = json.loads(inspect(self.image)["Config"])["config"]
        options = [f"--env={name}={value}" for name, value in (environ or {}).items()]
        options += [f"--volume={here}:{there}" for here, there in mounts]
        if host is not None:
            # The names of all hosts are in the file that the host sees
            options += ["--hostname", host.name, "--no-hosts", "--volume=/etc/hosts:/etc/hosts:ro"]
        command = [find("buildah"), "run", *options, self.name, "--", *config["Entrypoint"]]
        command += map(str, arguments or config["Cmd"])
        return command if host is None else host.inside(*command)
