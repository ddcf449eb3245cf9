"""The JobSets: checked against schemas, and what becomes of them as their pods end.

The Job in each is checked against the schemas of Kubernetes that the package kubernetes-validate holds, in their
strict form: unknown fields are errors. No package holds the schema of a JobSet: JOBSET has the fields that these
files use, as the JobSet API v1alpha2 documents them. `Cluster` follows the documented rules of both controllers.
"""

import copy
import math
import re
import signal
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from command_case import check_command
from stand_ins import ROOT

from mvar_jax.processes.cluster import find_place
from mvar_jax.processes.join import MEET_BELOW_S, MEET_S, MEET_VARIABLE
from mvar_jax.processes.patience import read_seconds
from mvar_jax.stopping import LOST_STATUS, STOPPED_STATUS

FOLDER = ROOT / "launch/k8s"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))
ACTIONS = ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]
NAMES = {"type": "array", "items": {"type": "string"}}


def record(required: list[str], **properties) -> dict:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


RULE = record(
    ["name", "action"],
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ACTIONS},
    onJobFailureReasons={
        "type": "array",
        "items": {"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]},
    },
    targetReplicatedJobs=NAMES,
)
JOBSET = record(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=record(
        ["name"],
        name={"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"},
        annotations={"type": "object"},
    ),
    spec=record(
        ["replicatedJobs", "failurePolicy"],
        failurePolicy=record(
            ["maxRestarts"], maxRestarts={"type": "integer"}, rules={"type": "array", "items": RULE}
        ),
        replicatedJobs={
            "type": "array",
            "items": record(
                ["name", "template"],
                name={"type": "string"},
                replicas={"type": "integer", "minimum": 1},
                template=record(["spec"], spec={"type": "object"}),
            ),
        },
    ),
)


@pytest.fixture(params=FILES)
def jobset(request) -> dict:
    return yaml.safe_load((FOLDER / request.param).read_text())


def job_of(jobset: dict) -> dict:
    (job,) = jobset["spec"]["replicatedJobs"]
    return job


def pod_of(jobset: dict) -> dict:
    return job_of(jobset)["template"]["spec"]["template"]["spec"]


def container_of(jobset: dict) -> dict:
    (container,) = pod_of(jobset)["containers"]
    return container


def validate(jobset: dict) -> None:
    """Raise an error unless Kubernetes and the JobSet controller would accept this."""
    jsonschema.Draft202012Validator(JOBSET).validate(jobset)
    for job in jobset["spec"]["replicatedJobs"]:
        manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": job["name"]}} | job["template"]
        for version in ("1.29", kubernetes_validate.latest_version()):
            kubernetes_validate.validate(manifest, version, strict=True)
        spec = job["template"]["spec"]
        names = {container["name"] for container in spec["template"]["spec"]["containers"]}
        # what the API server checks beside the schema
        assert spec["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy asks for this"
        for rule in spec["podFailurePolicy"]["rules"]:
            assert rule["action"] in ("FailJob", "Ignore", "Count", "FailIndex")
            assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
            if "onExitCodes" in rule:
                codes = rule["onExitCodes"]
                assert codes["containerName"] in names and codes["operator"] in ("In", "NotIn")
                assert codes["values"] == sorted(set(codes["values"])) and 0 not in codes["values"]


def test_jobset_is_valid(jobset):
    """`validate` raises for whatever is not; BROKEN shows that it does."""
    assert validate(jobset) is None


BROKEN = {
    "a misspelled field of the JobSet": lambda jobset: jobset["spec"].update(failurepolicy={}),
    "a misspelled field of the Job": lambda jobset: job_of(jobset)["template"]["spec"].update(backoffLimits=0),
    "a misspelled field of the pod": lambda jobset: pod_of(jobset).update(terminationGracePeriod=120),
    "a misspelled field of the container": lambda jobset: container_of(jobset).update(volumeMount=[]),
    "a variable that is a number": lambda jobset: container_of(jobset).update(env=[{"name": "A", "value": 2}]),
    "an action that does not exist": lambda jobset: jobset["spec"]["failurePolicy"]["rules"][0].update(
        action="Restart"
    ),
    "a container that does not exist": lambda jobset: container_of(jobset).update(name="other"),
    "pods that restart by themselves": lambda jobset: pod_of(jobset).update(restartPolicy="OnFailure"),
    "the status of success": lambda jobset: exit_codes(jobset).update(values=[0, 75]),
}


def exit_codes(jobset: dict) -> dict:
    return job_of(jobset)["template"]["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]


@pytest.mark.parametrize("name", BROKEN)
def test_broken_jobset_is_not_valid(jobset, name):
    broken = copy.deepcopy(jobset)
    BROKEN[name](broken)
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError, AssertionError)):
        validate(broken)


class Cluster:
    """A JobSet with the controllers' answers to pods that end. `state` is running, complete or failed."""

    def __init__(self, jobset: dict):
        self._policy = jobset["spec"]["failurePolicy"]
        self._job = job_of(jobset)["template"]["spec"]
        self.state, self.num_restarts, self._num_counted = "running", 0, 0

    def end_pods(self, *statuses: int | None, is_disrupted: bool = False) -> None:
        """The pods of an attempt end, in the order in which the controller sees them.

        Args:
          statuses: exit status of each pod, or one for all; None if a lost node keeps it from being known. The
            backoffLimit is 0, so that the first pod that failed decides.
          is_disrupted: the cluster took the node of the first pod away, and says so.
        """
        failed = [(status, is_disrupted and not i) for i, status in enumerate(statuses) if status not in (0, None)]
        if not failed:
            assert None not in statuses, "a pod that is never seen to end is not complete"
            self.state = "complete"
            return
        reason = self._reason_of(*failed[0])
        action = "RestartJobSet"
        for rule in self._policy["rules"]:
            if reason in rule["onJobFailureReasons"]:
                action = rule["action"]
                break
        is_counted = action == "RestartJobSet"
        if action == "FailJobSet" or (is_counted and self._num_counted >= self._policy["maxRestarts"]):
            self.state = "failed"
            return
        self.num_restarts += 1
        self._num_counted += is_counted

    def _reason_of(self, status: int, is_disrupted: bool) -> str:
        """Why the Job fails: a rule of podFailurePolicy, the first that matches, or its backoffLimit of 0."""
        assert self._job["backoffLimit"] == 0
        for rule in self._job["podFailurePolicy"]["rules"]:
            conditions = [(entry["type"], entry["status"]) for entry in rule.get("onPodConditions", [])]
            is_match = status in rule.get("onExitCodes", {}).get("values", [])
            if is_match or (is_disrupted and ("DisruptionTarget", "True") in conditions):
                assert rule["action"] == "FailJob"
                return "PodFailurePolicy"
        return "BackoffLimitExceeded"


def test_run_that_is_stopped_any_number_of_times_continues_to_its_end(jobset):
    cluster = Cluster(jobset)
    for _ in range(50):
        cluster.end_pods(STOPPED_STATUS)
        cluster.end_pods(137, is_disrupted=True)  # killed before it had saved: from its newest checkpoint
        assert cluster.state == "running"
    cluster.end_pods(0)
    assert cluster.state == "complete" and cluster.num_restarts == 100


@pytest.mark.parametrize("status", [LOST_STATUS, 128 + signal.SIGABRT])
def test_pods_that_lost_another_one_continue_any_number_of_times(jobset, status):
    """A node that is gone never says how its pod ended: only the pods that are left do. JAX ends them by SIGABRT."""
    cluster = Cluster(jobset)
    for _ in range(50):
        cluster.end_pods(None, status)
        cluster.end_pods(137, status, is_disrupted=True)
        cluster.end_pods(status, 137)
        assert cluster.state == "running"
    cluster.end_pods(0, 0)
    assert cluster.state == "complete" and cluster.num_restarts == 150


@pytest.mark.parametrize("status", [1, 2, 137])
def test_run_that_fails_is_restarted_a_few_times_only(jobset, status):
    cluster = Cluster(jobset)
    for _ in range(10):
        if cluster.state == "running":
            cluster.end_pods(status)
    assert cluster.state == "failed" and cluster.num_restarts == 3


def test_pods_wait_for_a_node_that_comes_late(jobset, monkeypatch):
    """Those that give up exit with 2, which counts."""
    variables = {entry["name"]: entry.get("value") for entry in container_of(jobset)["env"]}
    monkeypatch.setenv(MEET_VARIABLE, variables[MEET_VARIABLE])
    assert read_seconds(MEET_VARIABLE, MEET_S, MEET_BELOW_S) >= 12 * 3600


def test_stops_do_not_use_up_the_restarts_after_failures(jobset):
    cluster = Cluster(jobset)
    for status in (STOPPED_STATUS, 1, LOST_STATUS, 1, STOPPED_STATUS, 1, LOST_STATUS):
        cluster.end_pods(status)
    assert cluster.state == "running"


def test_cards_of_a_pod_have_shared_memory_to_exchange_data():
    jobset = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    container, pod = container_of(jobset), pod_of(jobset)
    (name,) = (mount["name"] for mount in container["volumeMounts"] if mount["mountPath"] == "/dev/shm")
    (volume,) = (volume for volume in pod["volumes"] if volume["name"] == name)
    assert volume["emptyDir"]["medium"] == "Memory"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_pods_of_gpus_are_the_processes_of_one_run():
    jobset = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
    job, container = job_of(jobset), container_of(jobset)
    spec = job["template"]["spec"]
    num_cards = container["resources"]["limits"]["nvidia.com/gpu"]
    places = []
    for index in range(spec["completions"]):
        environment = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
        for entry in container["env"]:
            field = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            assert field in (None, "metadata.annotations['batch.kubernetes.io/job-completion-index']")
            environment[entry["name"]] = str(index) if field else entry["value"]
        places.append(find_place(environment, num_cards=num_cards))
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    assert [place.process_id for place in places] == list(range(spec["parallelism"]))
    assert {place.num_processes for place in places} == {spec["parallelism"]}
    assert {place.num_devices for place in places} == {num_cards}
    name = jobset["metadata"]["name"]  # the controller's names: JobSet, Job, its replica, pod, and the subdomain
    assert {place.coordinator_address.split(":")[0] for place in places} == {f"{name}-{job['name']}-0-0.{name}"}
    read = check_command(container["command"], "configs/imagenet256_d16.py", "/runs/imagenet256_d16", "auto")
    assert read["batch_size"] % (spec["parallelism"] * num_cards) == 0
    assert read["data"]["cache"].startswith(tuple(mount["mountPath"] for mount in container["volumeMounts"]))


def test_pods_of_tpus_are_the_hosts_of_the_slice():
    jobset = yaml.safe_load((FOLDER / "jobset_tpu.yaml").read_text())
    spec, container = job_of(jobset)["template"]["spec"], container_of(jobset)
    selector = pod_of(jobset)["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    num_chips = math.prod(map(int, selector["cloud.google.com/gke-tpu-topology"].split("x")))
    assert spec["parallelism"] * container["resources"]["limits"]["google.com/tpu"] == num_chips
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    workdir = "gs://BUCKET/runs/imagenet256_d16"
    read = check_command(container["command"], "configs/imagenet256_d16.py", workdir, "auto")
    assert read["batch_size"] % num_chips == 0


@pytest.mark.parametrize("file", FILES)
def test_image_is_built_under_the_name_that_is_pulled_and_for_the_accelerator(file):
    text = (FOLDER / file).read_text()
    container = container_of(yaml.safe_load(text))
    ((extras, image, pushed),) = re.findall(r"docker build .*EXTRAS=(\w+) -t (\S+) \. && docker push (\S+)", text)
    assert image == pushed == container["image"]
    (resource,) = container["resources"]["limits"]
    assert {"nvidia.com/gpu": "cuda12", "google.com/tpu": "tpu"}[resource] == extras
    applied = re.findall(r"kubectl apply -f (\S+)", text)
    assert [Path(path).name for path in applied] == [file]
