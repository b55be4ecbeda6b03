"""The cluster files: by Ray's own schema where there is one, of one version, and closed to the outside."""

import copy
import functools
import hashlib
import importlib.util
import ipaddress
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
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
CONTAINER = (ROOT / "jobs" / "Containerfile").read_text(encoding="utf-8")
*POLICIES, JOB = yaml.safe_load_all((ROOT / "jobs" / "rayjob.yaml").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TAG = re.fullmatch(r"rayproject/ray:([^@]+)@sha256:EDIT", CLUSTER["docker"]["image"])[1]
SPEC = JOB["spec"]["rayClusterSpec"]
GROUPS = {group["groupName"]: group for group in SPEC["workerGroupSpecs"]}
NODES = CLUSTER["available_node_types"]
PODS = {"submitter": JOB["spec"]["submitterPodTemplate"], "head": SPEC["headGroupSpec"]["template"]} | {
    name: group["template"] for name, group in GROUPS.items()
}


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
    assert f"FROM rayproject/ray:{TAG}@sha256:DIGEST\n" in CONTAINER and f"REGISTRY/vlsm:{TAG} ." in CONTAINER
    assert f"docker push REGISTRY/vlsm:{TAG}\n" in (ROOT / "jobs" / "rayjob.yaml").read_text(encoding="utf-8")


def test_images_have_digests_and_the_files_do_not_work_before_these_are_filled_in():
    images = {only["image"] for pod in PODS.values() for only in pod["spec"]["containers"]}
    assert images == {"REGISTRY/vlsm@sha256:DIGEST"}
    for image in (*images, CLUSTER["docker"]["image"]):
        assert not re.search(r"@sha256:[0-9a-f]{64}$", image)  # what Docker and Kubernetes take
    for path, word in (("cluster.yaml", "EDIT"), ("jobs/Containerfile", "DIGEST")):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert "docker buildx imagetools inspect" in text and f"sha256:{word}" in text


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
        (volume,) = (volume for volume in group["template"]["spec"]["volumes"] if volume["name"] == "shm")
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
        "",
        idleTimeoutSeconds=COUNT,
        upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
        env={"type": "array"},
        securityContext={"type": "object"},
        volumeMounts={"type": "array"},
        resources={"type": "object"},
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
        submitterPodTemplate=POD,
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


def test_its_pods_and_policies_are_kuberneteses_by_its_own_schema():
    import kubernetes_validate

    pods = [
        {"apiVersion": "v1", "kind": "Pod", **pod, "metadata": {"name": "ray", **pod["metadata"]}}
        for pod in PODS.values()
    ]
    options = SPEC["autoscalerOptions"]  # of the container that KubeRay adds to the head
    autoscaler = {key: options[key] for key in ("env", "securityContext", "volumeMounts", "resources")}
    pods[1]["spec"] = copy.deepcopy(pods[1]["spec"])
    pods[1]["spec"]["containers"].append(autoscaler | {"name": "autoscaler", "image": "x"})
    for document in (*pods, *POLICIES):
        kubernetes_validate.validate(document, "1.34", strict=True)


def containers():
    """Every container of the file, by a name, with the settings of its pod."""
    for name, pod in PODS.items():
        yield name, pod["spec"], container({"template": pod})
    yield "autoscaler", PODS["head"]["spec"], SPEC["autoscalerOptions"]


@pytest.mark.parametrize(("name", "pod", "own"), list(containers()), ids=[name for name, *_ in containers()])
def test_no_container_is_root_or_may_become_it_or_writes_to_its_image(name, pod, own):
    assert {"runAsNonRoot": True, "runAsUser": 1000}.items() <= pod["securityContext"].items()
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert own["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert own["resources"]["limits"].keys() >= {"cpu", "memory"}
    # what they write (Ray's sessions, caches below the home) goes to folders that end with the pod
    written = {mount["name"] for mount in own["volumeMounts"] if mount["mountPath"] == "/tmp"}
    assert written == {"tmp"} and {"name": "HOME", "value": "/tmp"} in own["env"]
    assert all(set(volume) == {"name", "emptyDir"} for volume in pod["volumes"])


def test_only_the_head_has_a_token_for_the_kubernetes_api():
    """Ray's autoscaler, a container of the head, reads it there."""
    from ray.autoscaler._private.kuberay import node_provider

    assert node_provider.IN_CLUSTER_TOKEN_PATH.startswith("/var/run/secrets/kubernetes.io/serviceaccount/")
    without = {name for name, pod in PODS.items() if pod["spec"].get("automountServiceAccountToken") is False}
    assert without == PODS.keys() - {"head"}


def selects(policy, labels):
    return policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items()


def test_policies_admit_the_runs_own_pods_and_three_others_by_port():
    ours = {"podSelector": {"matchLabels": {"app": "vlsm-segment"}}}
    everything, head = POLICIES
    assert {policy["apiVersion"] for policy in POLICIES} == {"networking.k8s.io/v1"}
    for name, pod in PODS.items():
        assert selects(everything, pod["metadata"]["labels"]), f"{name} is open to all"
    assert everything["spec"]["policyTypes"] == ["Ingress", "Egress"]  # what no rule admits is denied
    rules = everything["spec"]["ingress"] + everything["spec"]["egress"] + head["spec"]["egress"]
    peers = [rule.get("from") or rule.get("to") for rule in rules]
    assert all(peers) and not any(peer == {} for of_rule in peers for peer in of_rule)  # an empty one is everybody
    for rule, of_rule in zip(rules, peers, strict=True):
        assert of_rule == [ours] or rule["ports"], f"{rule} admits every port"
    opened = {port["port"] for rule in everything["spec"]["ingress"] for port in rule.get("ports", [])}
    assert opened == {8265, 8080}
    blocks = [peer["ipBlock"]["cidr"] for of_rule in peers for peer in of_rule if "ipBlock" in peer]
    assert blocks == ["STORE-CIDR", "API-SERVER-CIDR"]  # no addresses: Kubernetes refuses the file until they are given
    for block in blocks:
        with pytest.raises(ValueError):
            ipaddress.ip_network(block)
    assert selects(head, PODS["head"]["metadata"]["labels"] | {"ray.io/node-type": "head"})
    assert not selects(head, PODS["cpu"]["metadata"]["labels"] | {"ray.io/node-type": "worker"})


def test_containers_on_aws_gain_no_rights():
    options = CLUSTER["docker"]["run_options"]
    assert {"--cap-drop=ALL", "--security-opt=no-new-privileges"} <= set(options)
    assert not [option for option in options if re.search("privileged|cap-add|docker.sock|--user", option)]


def test_metrics_are_private_where_ray_binds_them():
    """Ray binds this port to all addresses of a node that has more than the loopback one; see the top of both files."""
    agent = Path(importlib.util.find_spec("ray").origin).parent / "dashboard/modules/reporter/reporter_agent.py"
    binding = 'address=get_localhost_ip() if is_localhost(self._ip) else ""'
    assert binding in agent.read_text(encoding="utf-8")  # else the comments in both files are out of date
    commands = CLUSTER["head_start_ray_commands"] + CLUSTER["worker_start_ray_commands"]
    ports = {port for text in commands for port in re.findall(r"--metrics-export-port=(\d+)", text)}
    ports |= {group["rayStartParams"]["metrics-export-port"] for group in (SPEC["headGroupSpec"], *GROUPS.values())}
    assert ports == {"8080"}
    (rule,) = (
        rule for rule in POLICIES[0]["spec"]["ingress"] if {"port": 8080, "protocol": "TCP"} in rule.get("ports", [])
    )
    (peer,) = rule["from"]
    assert peer == {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "PROMETHEUS-NAMESPACE"}}}


INSTALL = "python -m pip install -q --require-hashes -r requirements.lock"


def test_nodes_and_the_image_install_nothing_without_its_hash():
    (setup,) = CLUSTER["setup_commands"]
    (build,) = re.findall(r"^RUN cd vlsm && (.*?[^\\])$", CONTAINER, re.S | re.M)
    for command in (setup.removeprefix("cd ~/vlsm && "), re.sub(r"\\\n\s+", "", build)):
        first, second = command.strip().split(" && ")
        assert first == INSTALL and second == "python -m pip install -q --no-deps --no-build-isolation ."
    build_system = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    assert set(build_system["requires"]) <= set(PROJECT["optional-dependencies"]["cluster"])  # is in the lock too


def test_the_documented_command_writes_a_lock_with_hashes_and_without_hosts(tmp_path):
    """As it stands in jobs/README.md, for a small project and from a folder with one wheel."""
    readme = (ROOT / "jobs" / "README.md").read_text(encoding="utf-8")
    pin, command = re.search(r"^echo ray==(\S+) \| uv (pip compile .*?[^\\])$", readme, re.M | re.S).groups()
    words = shlex.split(command.replace("\\\n", " "))
    assert pin == SPEC["rayVersion"]
    stated = [words[words.index(flag) + 1] for flag in ("--python-version", "--output-file")]
    assert stated == [TAG.split("py")[1].split("-")[0].replace("3", "3.", 1), "requirements.lock"]
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "tiny-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    project = '[project]\nname = "p"\nversion = "1"\ndependencies = ["tiny"]\n'
    (tmp_path / "pyproject.toml").write_text(project + "[project.optional-dependencies]\ntrain = []\ncluster = []\n")
    uv = [str(Path(sys.executable).with_name("uv")), "--no-config", "--offline"]
    own = [*uv, *words, "--no-index", "--find-links", "wheels"]
    subprocess.run(own, cwd=tmp_path, check=True, capture_output=True, timeout=60, input=b"tiny==1.0\n")
    lock = (tmp_path / "requirements.lock").read_text(encoding="utf-8")
    digest = hashlib.sha256((wheels / "tiny-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    assert "tiny==1.0" in lock and f"--hash=sha256:{digest}" in lock
    assert "://" not in lock and "index" not in lock
