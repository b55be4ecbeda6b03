"""The cluster files: by Ray's own schema where there is one, of one version, and closed to the outside."""

import copy
import functools
import re
import shlex
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from jobs.segment_pools import plan_pools
from vlsm.config import SegmentSettings, load_settings

ROOT = Path(__file__).parents[1]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
JOB = yaml.safe_load((ROOT / "jobs" / "rayjob.yaml").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TAG = CLUSTER["docker"]["image"].partition(":")[2]
SPEC = JOB["spec"]["rayClusterSpec"]
GROUPS = {group["groupName"]: group for group in SPEC["workerGroupSpecs"]}
NODES = CLUSTER["available_node_types"]


def scalars(tree):
    if isinstance(tree, dict | list):
        for value in [*tree, *tree.values()] if isinstance(tree, dict) else tree:
            yield from scalars(value)
    else:
        yield tree


def container(group):
    (only,) = group["template"]["spec"]["containers"]
    return only


def test_ray_takes_the_cluster_by_its_own_schema():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(copy.deepcopy(CLUSTER) | {"cluster_synced_files": []})  # nothing else is left to defaults
    prepared = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(prepared)
    assert {
        name: (node["min_workers"], node["max_workers"]) for name, node in prepared["available_node_types"].items()
    } == {
        "head": (0, 0),
        "cpu": (1, 4),
        "gpu": (0, 8),
    }
    # Ray's defaults would bring another package of Ray, and boto3 against the pins
    assert prepared["head_setup_commands"] == prepared["worker_setup_commands"] == CLUSTER["setup_commands"]


def test_the_version_of_ray_and_python_is_the_packages():
    ray, python = re.fullmatch(r"([\d.]+)-py(3\d+)-gpu", TAG).groups()
    (wanted,) = (own for own in map(Requirement, PROJECT["dependencies"]) if own.name == "ray")
    assert Version(ray) in wanted.specifier
    assert f"Programming Language :: Python :: 3.{python[1:]}" in PROJECT["classifiers"]
    assert SPEC["rayVersion"] == ray
    images = {container(group)["image"] for group in (SPEC["headGroupSpec"], *GROUPS.values())}
    assert images == {f"REGISTRY/vlsm:{TAG}"}
    assert f"FROM {CLUSTER['docker']['image']}\n" in (ROOT / "jobs" / "rayjob.yaml").read_text(encoding="utf-8")


def test_nothing_is_open_to_the_outside():
    assert CLUSTER["provider"]["use_internal_ips"] is True
    assert "security_group" not in CLUSTER["provider"]  # Ray would open port 22 of one that it makes
    for node in NODES.values():
        assert node["node_config"]["SecurityGroupIds"] and "NetworkInterfaces" not in node["node_config"]
        assert all(disk["Ebs"]["Encrypted"] for disk in node["node_config"]["BlockDeviceMappings"])
    (start,) = (command for command in CLUSTER["head_start_ray_commands"] if "--head" in command)
    assert "--dashboard-host=127.0.0.1" in start and "--env RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    assert not [text for text in map(str, [*scalars(CLUSTER), *scalars(JOB)]) if "0.0.0.0" in text]
    assert SPEC["headGroupSpec"]["serviceType"] == "ClusterIP" and "enableIngress" not in SPEC["headGroupSpec"]
    assert SPEC["authOptions"] == {"mode": "token"}
    assert not {"hostNetwork", "hostPort", "nodePort", "LoadBalancer"} & set(map(str, scalars(JOB)))


def test_no_credentials_stand_in_the_files():
    words = re.compile(r"AKIA|aws_secret|secret_access_key|password|-----BEGIN", re.I)
    assert not [text for text in map(str, [*scalars(CLUSTER), *scalars(JOB)]) if words.search(text)]
    assert all("IamInstanceProfile" in node["node_config"] for node in NODES.values())


def test_shared_memory_holds_the_object_store():
    (limit,) = (
        re.fullmatch(r"--shm-size=(\d+)g", word)[1] for word in CLUSTER["docker"]["run_options"] if "shm" in word
    )
    (start,) = (command for command in CLUSTER["worker_start_ray_commands"] if "ray start" in command)
    store = int(re.search(r"--object-store-memory=(\d+)", start)[1])
    assert store == 16 * 2**30 < int(limit) * 2**30
    for group in GROUPS.values():
        assert int(group["rayStartParams"]["object-store-memory"]) == store
        (volume,) = group["template"]["spec"]["volumes"]
        assert volume["emptyDir"] == {"medium": "Memory", "sizeLimit": "17Gi"}


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_both_clusters_have_one_shape(name):
    group, node = GROUPS[name], NODES[name]
    assert (group["minReplicas"], group["maxReplicas"]) == (node["min_workers"], node["max_workers"])
    assert ("nvidia.com/gpu" in container(group)["resources"]["limits"]) == ("GPU" in node["resources"])
    assert container(group)["resources"]["limits"] == container(group)["resources"]["requests"]


def fields(required, **properties):
    own = {"required": required.split(), "properties": properties, "additionalProperties": False}
    return {"type": "object"} | own


TEXT, FLAG, COUNT = {"type": "string"}, {"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
START = {"type": "object", "additionalProperties": TEXT}
POD = {"type": "object", "required": ["spec"]}  # Kubernetes' own schema has the rest
HEAD = fields("rayStartParams template", rayStartParams=START, template=POD, serviceType={"enum": ["ClusterIP"]})
WORKERS = fields(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=TEXT,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    rayStartParams=START,
    template=POD,
)
RAY_CLUSTER = fields(
    "headGroupSpec",
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    authOptions=fields("mode", mode={"enum": ["disabled", "token"]}),
    autoscalerOptions=fields(
        "", idleTimeoutSeconds=COUNT, upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]}
    ),
    headGroupSpec=HEAD,
    workerGroupSpecs={"type": "array", "items": WORKERS},
)
RAY_JOB = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields("name", name=TEXT),
    spec=fields(
        "",
        backoffLimit=COUNT,
        entrypoint=TEXT,
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=COUNT,
        rayClusterSpec=RAY_CLUSTER,
    ),
)


def test_the_job_has_the_fields_of_a_rayjob():
    """Names, types and requirements as in KubeRay's `rayjobs.ray.io` v1 (1.5.1), of what this job uses."""
    jsonschema.validate(JOB, RAY_JOB, cls=jsonschema.Draft202012Validator)
    assert JOB["spec"]["shutdownAfterJobFinishes"] is True
    for group in (SPEC["headGroupSpec"], *GROUPS.values()):
        mounts = {mount["name"] for mount in container(group).get("volumeMounts", [])}
        assert mounts == {volume["name"] for volume in group["template"]["spec"].get("volumes", [])}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["backoffLimit"], "3"),
        (["rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"], 0),
        (["rayClusterSpec", "workerGroupSpecs", 0, "maxReplica"], 4),
        (["rayClusterSpec", "workerGroupSpecs", 1, "groupName"], None),
        (["rayClusterSpec", "authOptions"], "token"),
    ],
)
def test_a_mistake_in_it_would_be_found(path, value):
    job = copy.deepcopy(JOB)
    functools.reduce(lambda tree, key: tree[key], path[:-1], job["spec"])[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(job, RAY_JOB, cls=jsonschema.Draft202012Validator)


def test_the_head_does_no_work_and_a_run_is_planned_before_there_are_workers():
    assert NODES["head"]["resources"] == {"CPU": 0} and SPEC["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    words = shlex.split(JOB["spec"]["entrypoint"])
    assert words[:3] == ["python", "-m", "jobs.segment"]
    sets = [word for flag, word in zip(words, words[1:], strict=False) if flag == "--set"]
    arguments = {"input": words[3], "output": words[4], "members": [{"checkpoint": words[6]}]}
    settings = load_settings(SegmentSettings, None, sets, arguments)
    (pool,) = plan_pools(settings, [{"Alive": True, "Resources": {"memory": 1e9}}])
    assert (pool.num_actors, pool.num_gpus, pool.num_cpus) == ((1, GROUPS["gpu"]["maxReplicas"]), 1, 1)


def test_its_pods_are_kuberneteses_by_its_own_schema():
    import kubernetes_validate

    for group in (SPEC["headGroupSpec"], *GROUPS.values()):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "ray"}, **group["template"]}
        kubernetes_validate.validate(pod, "1.34", strict=True)
