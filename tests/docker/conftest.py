"""The images, built and run by buildah: minutes for the first time, seconds for what was built before."""

import contextlib
import os
import subprocess

import pytest
from support import images
from support.launching import EndedRun


@pytest.fixture(scope="session")
def image(tmp_path_factory):
    """The image of docker/Dockerfile."""
    if reason := images.missing():
        pytest.skip(reason)
    return images.build(tmp_path_factory.mktemp("image"))


@pytest.fixture
def shared(tmp_path):
    """A folder that mpiuser can write to, as a volume is."""
    folder = tmp_path / "shared"
    folder.mkdir()
    os.chown(folder, 1000, 1000)
    return folder


class Bench:
    """Containers that end with the test, and what they run."""

    def __init__(self, stack, shared):
        self.stack, self.shared, self.started = stack, shared, []

    def begin(self, image, *arguments, mounts=(), **options):
        """Start a command in a container of its own."""
        container = self.stack.enter_context(images.Container(image))
        mounts = [(self.shared, "/shared"), *mounts]
        process = subprocess.Popen(
            container.command(*arguments, mounts=mounts, **options),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=images.environ(),
            start_new_session=True,
        )
        self.stack.callback(self.end, process, 0)
        return process

    @staticmethod
    def end(process, seconds=600):
        """Wait for a command's end; one that goes on is ended."""
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            out, err = process.communicate(timeout=60)
        return EndedRun(process.returncode, out, err)

    def run(self, *arguments, **options):
        """Run to the end."""
        return self.end(self.begin(*arguments, **options))


@pytest.fixture
def bench(shared):
    with contextlib.ExitStack() as stack:
        yield Bench(stack, shared)
