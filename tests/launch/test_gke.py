"""The manifests of launch/gke against the API, as kubeflow-trainer-api has it."""

import copy
import math
import pathlib

import pydantic
import pytest
import yaml
from kubeflow_trainer_api import models

FOLDER = pathlib.Path(__file__).parents[2] / "launch" / "gke"
KINDS = ("tpu", "gpu")


def read(kind: str) -> dict:
  return yaml.safe_load((FOLDER / f"{kind}.yaml").read_text())


def unchanged(manifest: dict) -> bool:
  """Returns whether the API knows every field and misses none: it drops, and adds."""
  return models.JobsetV1alpha2JobSet.from_dict(manifest).to_dict() == manifest


def job(manifest: dict) -> dict:
  (replicated,) = manifest["spec"]["replicatedJobs"]
  return replicated["template"]["spec"]


def container(manifest: dict) -> dict:
  (found,) = job(manifest)["template"]["spec"]["containers"]
  return found


@pytest.mark.parametrize("kind", KINDS)
def test_manifests_follow_the_published_schema(kind):
  assert unchanged(read(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_schema_finds_mistakes(kind):
  good = read(kind)
  for place in (
    lambda m: m["spec"],
    job,
    lambda m: job(m)["template"]["spec"],
    container,
  ):
    bad = copy.deepcopy(good)
    place(bad)["replicass"] = 1
    assert not unchanged(bad)
  bad = copy.deepcopy(good)
  job(bad)["parallelism"] = "4"
  with pytest.raises(pydantic.ValidationError):
    unchanged(bad)
  bad = copy.deepcopy(good)
  del container(bad)["name"]
  assert not unchanged(bad)


@pytest.mark.parametrize("kind", KINDS)
def test_hosts_restart_together_and_save_before(kind):
  manifest = read(kind)
  assert job(manifest)["parallelism"] == job(manifest)["completions"]
  assert job(manifest)["backoffLimit"] == 0
  assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
  pod = job(manifest)["template"]["spec"]
  assert pod["restartPolicy"] == "Never"  # podFailurePolicy asks for it
  assert pod["terminationGracePeriodSeconds"] >= 60
  assert container(manifest)["args"][0] == kind  # of launch/env
  volumes = {v["name"] for v in pod["volumes"]}
  assert {m["name"] for m in container(manifest)["volumeMounts"]} == volumes


def test_the_hosts_make_up_the_slice():
  manifest = read("tpu")
  chips = container(manifest)["resources"]["limits"]["google.com/tpu"]
  selector = job(manifest)["template"]["spec"]["nodeSelector"]
  topology = selector["cloud.google.com/gke-tpu-topology"].split("x")
  assert chips * job(manifest)["parallelism"] == math.prod(map(int, topology))


def test_the_gpu_processes_are_told_of_each_other():
  manifest = read("gpu")
  values = {e["name"]: e.get("value") for e in container(manifest)["env"]}
  assert values["JAX_NUM_PROCESSES"] == str(job(manifest)["parallelism"])
  (replicated,) = manifest["spec"]["replicatedJobs"]
  host = "${NAME}-" + replicated["name"] + "-0-0.${NAME}"
  assert values["JAX_COORDINATOR_ADDRESS"] == f"{host}:8476"
  gpus = container(manifest)["resources"]["limits"]["nvidia.com/gpu"]
  assert values["JAX_LOCAL_DEVICE_IDS"] == ",".join(map(str, range(gpus)))
