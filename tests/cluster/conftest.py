"""Runs on several hosts: namespaces of this machine with names, addresses and ssh servers."""

import shutil
from pathlib import Path

import pytest
from support.cluster import JOB, Cluster, weights
from support.hosts import Hosts, missing
from support.launching import ROOT, core_of_its_own

__all__ = ["core_of_its_own"]  # a fixture


def pytest_collection_modifyitems(items):
    """Mark what is not short as long, so that one expression selects from several suites."""
    for item in items:
        if item.path.parent == Path(__file__).parent and not item.get_closest_marker("short"):
            item.add_marker("long")


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("hosts") / "hosts", 3) as found:
        yield found


@pytest.fixture
def cluster(hosts, tmp_path):
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    made = Cluster(hosts, tmp_path)
    yield made
    try:
        made.seconds_until(lambda: not made.left(), 8)
    finally:
        left = made.left()
        for host in hosts.hosts:
            host.end_runs()
    assert not left


@pytest.fixture(scope="session")
def undisturbed(hosts, tmp_path_factory):
    """The weights of JOB on two hosts."""
    made = Cluster(hosts, tmp_path_factory.mktemp("undisturbed"))
    shutil.copytree(ROOT / "jobs", made.folder / "jobs")
    ended = made.train("a:1,b:1", *JOB)
    assert ended.code == 0, ended.text
    return weights(made.folder)
