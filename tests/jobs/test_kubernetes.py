"""The manifests in jobs/kubernetes/ are valid, and resume after an eviction.

Fields used in the files are checked against the documented types of batch/v1 and kubeflow.org/v1;
any other field is an error. If kubernetes-validate is installed (100 MiB of schemas), the files are
also validated against the full schemas of Kubernetes.
"""

# ruff: noqa: N815 (fields have the names of the API)
import importlib
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data_prep.format.command_line import parse_arguments
from simmim.cli import BAD_INPUT, app
from simmim.engine.exit_codes import STOPPED
from simmim.recipe import load
from simmim.tasks.pretrain.recipe import PretrainRecipe

ROOT = Path(__file__).parents[2]
JOB, PYTORCH_JOB = (ROOT / "jobs" / "kubernetes" / name for name in ("job.yaml", "pytorchjob.yaml"))
GPU = "nvidia.com/gpu"
VERSIONS = ("1.31", "1.34")

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?([EPTGMk]i?|m)?$")]
Path_ = Annotated[str, Field(pattern="^/")]


class Strict(BaseModel):
    """A type of the API; unknown fields and values of another type are errors."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Name


class Variable(Strict):
    name: str
    value: str  # a number must be quoted


class Resources(Strict):
    requests: dict[str, Quantity | int]
    limits: dict[str, Quantity | int]


class Mount(Strict):
    name: Name
    mountPath: Path_
    readOnly: bool = False


class Container(Strict):
    name: Name
    image: str
    workingDir: Path_
    command: list[str]
    env: list[Variable] = []
    resources: Resources
    volumeMounts: list[Mount]


class Claim(Strict):
    claimName: Name
    readOnly: bool = False


class EmptyDir(Strict):
    medium: Literal["", "Memory"]
    sizeLimit: Quantity


class Volume(Strict):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class PodSpec(Strict):
    restartPolicy: Literal["Never", "OnFailure"] | None = None
    terminationGracePeriodSeconds: Annotated[int, Field(ge=0)]
    containers: list[Container]
    volumes: list[Volume]


class Template(Strict):
    spec: PodSpec


class ExitCodes(Strict):
    containerName: Name
    operator: Literal["In", "NotIn"]
    values: Annotated[list[int], Field(min_length=1, max_length=255)]


class PodCondition(Strict):
    type: str
    status: Literal["True", "False", "Unknown"]


class Rule(Strict):
    action: Literal["FailJob", "FailIndex", "Ignore", "Count"]
    onExitCodes: ExitCodes | None = None
    onPodConditions: list[PodCondition] | None = None


class FailurePolicy(Strict):
    rules: Annotated[list[Rule], Field(min_length=1, max_length=20)]


class JobSpec(Strict):
    completions: int
    parallelism: int
    backoffLimit: int
    podReplacementPolicy: Literal["Failed", "TerminatingOrFailed"]
    podFailurePolicy: FailurePolicy
    template: Template


class Job(Strict):
    apiVersion: Literal["batch/v1"]
    kind: Literal["Job"]
    metadata: Metadata
    spec: JobSpec


class ElasticPolicy(Strict):
    rdzvBackend: Literal["c10d", "etcd", "etcd-v2"]
    minReplicas: int
    maxReplicas: int
    maxRestarts: int


class RunPolicy(Strict):
    cleanPodPolicy: Literal["All", "Running", "None"]
    backoffLimit: int


class Replicas(Strict):
    replicas: int
    restartPolicy: Literal["Always", "OnFailure", "Never", "ExitCode"]
    template: Template


class PyTorchJobSpec(Strict):
    nprocPerNode: str
    elasticPolicy: ElasticPolicy
    runPolicy: RunPolicy
    pytorchReplicaSpecs: dict[Literal["Master", "Worker"], Replicas]


class PyTorchJob(Strict):
    apiVersion: Literal["kubeflow.org/v1"]
    kind: Literal["PyTorchJob"]
    metadata: Metadata
    spec: PyTorchJobSpec


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def job() -> Job:
    return Job.model_validate(read(JOB))


def pytorch_job() -> PyTorchJob:
    return PyTorchJob.model_validate(read(PYTORCH_JOB))


def pods() -> list[PodSpec]:
    worker = pytorch_job().spec.pytorchReplicaSpecs["Worker"]
    return [job().spec.template.spec, worker.template.spec]


def ours(pod: PodSpec) -> list[str]:
    (container,) = pod.containers
    return container.command[container.command.index("simmim") + 1 :]


def test_an_unknown_field_is_rejected() -> None:
    values = read(JOB)
    values["spec"]["template"]["spec"]["terminationGracePeriod"] = 300
    with pytest.raises(ValidationError, match="terminationGracePeriod"):
        Job.model_validate(values)


@pytest.mark.parametrize("version", VERSIONS)
def test_manifests_match_kubernetes_schemas(version: str) -> None:
    try:
        schemas = importlib.import_module("kubernetes_validate")
    except ImportError:
        pytest.skip("kubernetes-validate is not installed: pip install kubernetes-validate")
    schemas.validate(read(JOB), version, strict=True)
    template = read(PYTORCH_JOB)["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "worker"}, **template}
    schemas.validate(pod, version, strict=True)


@pytest.mark.parametrize("pod", pods(), ids=["job", "pytorchjob"])
def test_a_pod_resumes_and_has_time_for_a_checkpoint(
    pod: PodSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    given = parse_arguments(app, ours(pod))[1].arguments
    arguments, overrides = given["options"], given.get("overrides", ())
    recipe = load(PretrainRecipe, arguments.config, overrides)
    assert arguments.resume == "auto"
    assert pod.terminationGracePeriodSeconds >= 300
    (container,) = pod.containers
    writable = [mount.mountPath for mount in container.volumeMounts if not mount.readOnly]
    assert arguments.folder.startswith(tuple(f"{path}/" for path in writable))
    assert isinstance(recipe.data.shards, str)
    assert recipe.data.shards.startswith("/shards/")
    assert container.resources.limits[GPU] == 8


@pytest.mark.parametrize("pod", pods(), ids=["job", "pytorchjob"])
def test_mounted_volumes_exist(pod: PodSpec) -> None:
    (container,) = pod.containers
    volumes = {volume.name for volume in pod.volumes}
    assert {mount.name for mount in container.volumeMounts} == volumes
    for volume in pod.volumes:
        assert (volume.persistentVolumeClaim is None) != (volume.emptyDir is None)
    assert "/dev/shm" in {mount.mountPath for mount in container.volumeMounts}


def test_the_job_is_retried_after_a_stop_but_not_after_bad_input() -> None:
    spec = job().spec
    assert spec.template.spec.restartPolicy == "Never"  # required by podFailurePolicy
    assert spec.podReplacementPolicy == "Failed"
    name = spec.template.spec.containers[0].name
    by_code = {}
    for rule in spec.podFailurePolicy.rules:
        assert (rule.onExitCodes is None) != (rule.onPodConditions is None)
        if rule.onExitCodes is not None:
            assert rule.onExitCodes.containerName == name
            by_code |= dict.fromkeys(rule.onExitCodes.values, rule.action)
    assert by_code == {STOPPED: "Ignore", BAD_INPUT: "FailJob"}  # LOST and 137 start a new pod
    assert spec.backoffLimit >= 3
    first = spec.podFailurePolicy.rules[0]
    assert first.onPodConditions == [PodCondition(type="DisruptionTarget", status="True")]
    assert first.action == "Ignore"


def test_the_batch_divides_over_any_number_of_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    spec = pytorch_job().spec
    policy, worker = spec.elasticPolicy, spec.pytorchReplicaSpecs["Worker"]
    assert policy.minReplicas <= worker.replicas <= policy.maxReplicas
    assert worker.template.spec.restartPolicy is None  # the operator would overwrite it
    assert worker.template.spec.containers[0].name == "pytorch"
    given = parse_arguments(app, ours(worker.template.spec))[1].arguments
    arguments, overrides = given["options"], given.get("overrides", ())
    recipe = load(PretrainRecipe, arguments.config, overrides)
    for nodes in range(policy.minReplicas, policy.maxReplicas + 1):
        world = nodes * int(spec.nprocPerNode)
        assert recipe.training.batch_size % (world * recipe.training.accumulation) == 0
