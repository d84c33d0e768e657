"""The job for Kubernetes: its fields against the published ones of MPIJob v2beta1, and its parts against each other and against the image."""

import copy
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from support.launching import ROOT

from hvdlarge.launch import parse_hosts

SCHEMA = json.loads((Path(__file__).parent / "mpijob.schema.json").read_text(encoding="utf-8"))
JOB = yaml.safe_load((ROOT / "docker/templates/mpijob.yaml").read_text(encoding="utf-8"))
LAUNCHER, WORKER = (JOB["spec"]["mpiReplicaSpecs"][name] for name in ("Launcher", "Worker"))


def test_fields_are_those_that_are_published():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(JOB, SCHEMA)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("spec", "slotPerWorker"), 4),
        (("spec", "slotsPerWorker"), "4"),
        (("spec", "mpiReplicaSpecs", "Launcher", "template", "spec", "fsGroup"), 1000),
        (("spec", "mpiReplicaSpecs", "Worker", "template", "spec", "containers", 0, "args", 0), 1),
        (("apiVersion",), "kubeflow.org/v1"),
    ],
)
def test_a_wrong_field_is_found(where, value):
    job = copy.deepcopy(JOB)
    place = job
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, SCHEMA)


def container(replica):
    (found,) = replica["template"]["spec"]["containers"]
    return found


def test_workers_slots_and_gpus_agree():
    arguments = container(LAUNCHER)["args"]
    workers, slots = WORKER["replicas"], JOB["spec"]["slotsPerWorker"]
    assert int(arguments[arguments.index("-np") + 1]) == workers * slots
    assert container(WORKER)["resources"]["limits"]["nvidia.com/gpu"] == slots


def test_the_launcher_reads_the_hostfile_of_the_operator():
    """As newConfigMap in pkg/controller/mpi_job_controller.go of kubeflow/mpi-operator writes it for Open MPI."""
    name, slots = JOB["metadata"]["name"], JOB["spec"]["slotsPerWorker"]
    hosts = [f"{name}-worker-{i}.{name}-worker.space.svc" for i in range(WORKER["replicas"])]
    found = parse_hosts("".join(f"{host} slots={slots}\n" for host in hosts))
    assert found.value == ",".join(f"{host}:{slots}" for host in hosts)
    assert container(LAUNCHER)["args"][5:7] == ["--hosts-file", "/etc/mpi/hostfile"]


def test_every_mount_has_a_volume():
    for replica in (LAUNCHER, WORKER):
        volumes = {volume["name"] for volume in replica["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container(replica)["volumeMounts"]} == volumes


@pytest.mark.parametrize("file", ["Dockerfile", "Dockerfile.gpu"])
def test_user_and_home_are_those_of_the_image(file):
    text = (ROOT / "docker" / file).read_text(encoding="utf-8")
    (user,) = re.findall(r"^USER (\d+)$", text, re.MULTILINE)
    assert f"--uid {user} " in text
    (home,) = re.findall(r"^WORKDIR (/home/\S+)$", text, re.MULTILINE)
    assert JOB["spec"]["sshAuthMountPath"] == f"{home}/.ssh"
    for replica in (LAUNCHER, WORKER):
        assert replica["template"]["spec"]["securityContext"]["runAsUser"] == int(user)
