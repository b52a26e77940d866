"""The manifests of launch/gke against the API, as kubeflow-trainer-api has it."""

import copy
import importlib.metadata
import math
import pathlib
import re

import packaging.requirements
import packaging.utils
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


@pytest.mark.parametrize("kind", KINDS)
def test_mistakes_end_the_jobset_and_lost_hosts_do_not_count(kind):
  """As the JobSet controller reads the message of the Job controller."""
  manifest = read(kind)
  rules = job(manifest)["podFailurePolicy"]["rules"]
  policy = manifest["spec"]["failurePolicy"]

  def action(code: int, disrupted: bool = False) -> str:
    reason, message = "BackoffLimitExceeded", "Job has reached its backoff limit"
    for index, rule in enumerate(rules):
      codes = rule.get("onExitCodes", {}).get("values", [])
      if code in codes or (disrupted and "onPodConditions" in rule):
        reason = "PodFailurePolicy"
        message = f"... matching FailJob rule at index {index}"
        break
    for rule in policy["rules"]:
      patterns = rule.get("onJobFailureMessagePatterns", [""])
      if reason in rule["onJobFailureReasons"] and any(
        re.search(pattern, message) for pattern in patterns
      ):
        return rule["action"]
    return "RestartJobSet"

  assert action(2) == "FailJobSet"
  assert action(75) == "RestartJobSetAndIgnoreMaxRestarts"
  assert action(137, disrupted=True) == "RestartJobSetAndIgnoreMaxRestarts"
  assert action(134) == action(1) == "RestartJobSet"  # counted


def test_slices_use_the_network_of_their_hosts():
  pod = job(read("tpu"))["template"]["spec"]
  assert pod["hostNetwork"]
  assert pod["dnsPolicy"] == "ClusterFirstWithHostNet"


@pytest.mark.parametrize("extra", ["tpu", "cuda"])
def test_images_and_hosts_install_what_is_locked(extra):
  docker = (FOLDER / "Dockerfile").read_text()
  assert '--requirement "launch/lock/$EXTRA.txt"' in docker
  ignored = (FOLDER / "Dockerfile.dockerignore").read_text().split()
  assert {"data", "runs", ".git"} <= {*ignored}
  lines = (FOLDER.parent / "lock" / f"{extra}.txt").read_text().splitlines()
  pinned = {}
  for line in lines:
    requirement = packaging.requirements.Requirement(line)
    assert re.fullmatch(r"==[^*]+", str(requirement.specifier)), line
    pinned[requirement.name] = str(requirement.specifier)[2:]
  needed = importlib.metadata.requires("sdiff_jax")  # of setup.py
  assert len(needed) > 10
  for text in needed:
    requirement = packaging.requirements.Requirement(text)
    if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
      continue
    name = packaging.utils.canonicalize_name(requirement.name)
    assert pinned[name] in requirement.specifier, text
  assert pinned["jax"] == pinned["jaxlib"]
  assert ("libtpu" in pinned) == (extra == "tpu")


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
