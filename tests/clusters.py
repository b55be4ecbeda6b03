"""Clusters of several nodes on this machine, started as users start them, for the commands of jobs/README.md."""

import contextlib
import copy
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import yaml

from jobs.benchmarks.stores import free_port

ROOT = Path(__file__).parents[1]
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))
SECTION = (ROOT / "jobs" / "README.md").read_text("utf-8").partition("\n## On a cluster\n")[2].partition("\n## ")[0]
SUBMISSIONS = re.findall(r"^ray job submit .*?(?<!\\)$", SECTION, re.M | re.S)
STORE_BYTES = 300 << 20  # object store of each node
_HERE = "127.0.0.1"
_STARTING_S = 1200.0
_BRIDGE, _SUBNET = "vlsm0", "10.77.0"  # network of the hosts that `launched` makes


@dataclass
class Running:
    """A running cluster.

    Attributes:
        environment: variables with which commands reach it.
        address: address of its head for Ray, host:port.
        log: log file of its processes.
        processes: its `ray start` processes.
    """

    environment: dict[str, str]
    address: str
    log: Path
    processes: list[subprocess.Popen]

    def call(self, command: str, timeout_s: float = 1200) -> tuple[int, str]:
        """Run a command of jobs/README.md in the root of the repository; return its exit code and output."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        return done.returncode, done.stdout

    def wait_for_start(self) -> None:
        """Wait until the log says of each process that Ray has started."""
        deadline_s = time.monotonic() + _STARTING_S
        while self.log.read_text().count("Ray runtime started") < len(self.processes):
            if time.monotonic() > deadline_s or self.processes[-1].poll() is not None:
                raise TimeoutError(
                    f"a node has ended or did not start in {_STARTING_S:.0f} s: {self.log.read_text()[-4000:]}"
                )
            time.sleep(0.2)

    def wait_for_nodes(self, wanted: dict[str, float]) -> None:
        """Wait until the total resources of the live nodes are `wanted`."""
        deadline_s = time.monotonic() + _STARTING_S
        while time.monotonic() < deadline_s and all(process.poll() is None for process in self.processes):
            _, out = self.call(f"timeout 30 ray status --address {self.address}")
            resources = {name: float(total) for total, name in re.findall(r"^ [\d.]+/([\d.]+) (\w+)$", out, re.M)}
            if all(resources.get(name, 0) == amount for name, amount in wanted.items()):
                return
            time.sleep(1)
        log = self.log.read_text()[-4000:] if self.log.exists() else ""
        raise TimeoutError(f"the cluster does not have the resources {wanted}: {out[-4000:]} {log}")


def _environment(home: Path, extra: dict[str, str]) -> dict[str, str]:
    """Return the environment after the first commands of jobs/README.md, with a new home and its own Ray token."""
    home.mkdir(exist_ok=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    environment |= {"HOME": str(home), "PATH": path, "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"} | extra
    subprocess.run(["ray", "get-auth-token", "--generate"], env=environment, capture_output=True, check=True)
    return environment


@contextlib.contextmanager
def started(environment: dict[str, str], *nodes: str, autoscaling: dict | None = None):
    """Run `ray start --head`, and `ray start` once per entry of `nodes`; yield the cluster.

    Args:
        environment: additional variables of its processes.
        nodes: arguments of `ray start`, one string per node.
        autoscaling: content of a cluster file whose provider starts nodes.
    """
    # a short path, because it holds sockets and their paths are limited
    with tempfile.TemporaryDirectory(prefix="vlsm") as folder, contextlib.ExitStack() as stack:
        stack.callback(_end_all, folder)
        ports = {name: free_port() for name in ("port", "dashboard-port")}
        environment = _environment(Path(folder, "home"), environment)
        environment["RAY_API_SERVER_ADDRESS"] = f"http://{_HERE}:{ports['dashboard-port']}"
        address = f"{_HERE}:{ports['port']}"
        words = [f"--{name}={port}" for name, port in ports.items()]
        words += ["--num-cpus=0", f"--dashboard-host={_HERE}", f"--temp-dir={folder}/ray"]
        head = environment | {"AUTOSCALER_UPDATE_INTERVAL_S": "1"}
        if autoscaling is not None:
            autoscaling["provider"]["gcs_address"] = address
            number = autoscaling["provider"]["head_node_id"]
            head |= {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": number, "RAY_CLOUD_INSTANCE_ID": number}
            head |= {"RAY_FAKE_CLUSTER": "1", "RAY_enable_autoscaler_v2": "1"}
            Path(folder, "cluster.json").write_text(json.dumps(autoscaling))
            words.append(f"--autoscaling-config={folder}/cluster.json")
        log = stack.enter_context(Path(folder, "log").open("wb"))
        cluster = Running(environment, address, Path(folder, "log"), [])
        command = ["ray", "start", "--block", f"--node-ip-address={_HERE}", f"--object-store-memory={STORE_BYTES}"]
        joining = [(environment, [f"--address={address}", *node.split()]) for node in nodes]
        for variables, arguments in [(head, ["--head", *words]), *joining]:
            cluster.processes.append(subprocess.Popen([*command, *arguments], env=variables, stdout=log, stderr=log))
            cluster.wait_for_start()  # one after another: a simultaneous start is slow, and Ray waits only 30 s
        yield cluster


def _end_all(folder: str) -> None:
    """Kill the processes whose command line contains this temporary folder, and their children."""
    processes = [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(folder in word for word in process.info["cmdline"] or ())
    ]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes += process.children(recursive=True)
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def autoscaled(max_gpus: int) -> dict:
    """Return cluster.yaml for nodes that Ray's autoscaler starts and ends as processes of one CPU on this machine."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE

    config = copy.deepcopy(CLUSTER)
    # by module: the type "fake_multinode" needs a file of defaults that the package of Ray lacks
    module = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    provider = {"type": "external", "module": module, "launch_multiple": True, "head_node_id": FAKE_HEAD_NODE_ID}
    config |= {"provider": provider, "idle_timeout_minutes": 0.2, "head_node_type": FAKE_HEAD_NODE_TYPE}
    config |= {"docker": {}, "auth": {}, "file_mounts": {}, "cluster_synced_files": [], "initialization_commands": []}
    config |= dict.fromkeys(("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"), [])
    nodes = config["available_node_types"]
    for node in nodes.values():
        node["node_config"] = {}
        if node["resources"]["CPU"]:
            node["resources"] |= {"CPU": 1, "object_store_memory": STORE_BYTES}
    nodes[FAKE_HEAD_NODE_TYPE] = nodes.pop("head") | {"max_workers": 0}
    nodes["gpu"]["max_workers"] = max_gpus
    return config


def on_premises(head: str, workers: list[str], key: Path) -> dict:
    """Return cluster.yaml for existing hosts: workers that declare one CPU and one GPU, and a head with neither."""
    names = ("cluster_name", "upscaling_speed", "idle_timeout_minutes", "file_mounts", "rsync_exclude")
    config = {name: CLUSTER[name] for name in names}
    for role, cpus in ("head", "--num-cpus=0"), ("worker", "--num-cpus=1 --num-gpus=1"):
        commands = CLUSTER[f"{role}_start_ray_commands"]
        small = f"--object-store-memory={STORE_BYTES} {cpus}"
        config[f"{role}_start_ray_commands"] = [re.sub(r"--object-store-memory=\d+", small, line) for line in commands]
    config["provider"] = {"type": "local", "head_ip": head, "worker_ips": workers}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
    return config | {"min_workers": len(workers), "max_workers": len(workers)}


LAUNCHING = (
    "ip",
    "unshare",
    "rsync",
    "ssh",
    "ssh-keygen",
    "sshd",
)  # programs of Debian's iproute2, openssh-server, ...


def find_program(name: str) -> str | None:
    """Return the absolute path of a program, also from /usr/sbin and /sbin; sshd requires a start by this path."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@contextlib.contextmanager
def launched(num_workers: int):
    """Run `ray up` over SSH, yield the cluster, and run `ray down`; needs root, iproute2, openssh-server and rsync."""
    with tempfile.TemporaryDirectory(prefix="vlsm") as folder, contextlib.ExitStack() as stack:
        environment = _environment(Path(folder, "home"), {})
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", f"{folder}/key"], check=True)
        _ip(f"link add {_BRIDGE} type bridge")
        stack.callback(_ip, f"link del {_BRIDGE}")
        _ip(f"addr add {_SUBNET}.254/24 dev {_BRIDGE}")
        _ip(f"link set {_BRIDGE} up")
        head, *workers = (stack.enter_context(_host(Path(folder), number)) for number in range(1, num_workers + 2))
        file = Path(folder, "cluster.yaml")
        file.write_text(yaml.safe_dump(on_premises(head, workers, Path(folder, "key"))))
        cluster = Running(environment, f"{head}:6379", Path(folder, "log"), [])
        # the second version of the autoscaler counts the head as one of min_workers if all nodes have one type
        environment["RAY_UP_enable_autoscaler_v2"] = "0"
        code, out = cluster.call(f"ray up -y {file}")
        assert code == 0, out
        port = free_port()
        environment["RAY_API_SERVER_ADDRESS"] = f"http://localhost:{port}"
        tunnel = subprocess.Popen(["ray", "dashboard", "--port", str(port), str(file)], env=environment)
        stack.callback(tunnel.wait)
        stack.callback(tunnel.terminate)
        yield cluster
        code, out = cluster.call(f"ray down -y {file}")
        assert code == 0, out


@contextlib.contextmanager
def _host(folder: Path, number: int):
    """Make a host from namespaces of this machine: an address, an SSH server, separate processes and a home."""
    name, address = f"vlsm{number}", f"{_SUBNET}.{number}"
    home = folder / f"home{number}"
    home.mkdir()
    options = shlex.split(" ".join(CLUSTER["docker"]["run_options"]))
    variables = [word for option, word in itertools.pairwise(options) if option == "--env"]  # for containers
    variables.append(f"PATH={os.path.dirname(sys.executable)}:/usr/bin:/bin")
    (home / ".bashrc").write_text("".join(f"export {word}\n" for word in variables))
    settings = folder / f"sshd{number}"
    settings.write_text(
        f"HostKey {folder}/key\nAuthorizedKeysFile {folder}/key.pub\nStrictModes no\nPermitRootLogin yes\n"
        "PidFile none\n"
    )
    users = folder / f"passwd{number}"  # SSH reads the home folder from this file
    accounts = Path("/etc/passwd").read_text()
    users.write_text(re.sub(r"^(root:.*):[^:]*:([^:]*)$", rf"\1:{home}:\2", accounts, flags=re.M))
    # in a separate mount namespace: these paths, and those of Ray, are the same on every host
    inside = "mount -t tmpfs tmpfs /run && mkdir -p /run/sshd /tmp/ray && mount -t tmpfs tmpfs /tmp/ray"
    names = folder / f"hosts{number}"  # training workers find each other by host name
    names.write_text(f"127.0.0.1 localhost\n{address} {name}\n")
    inside += f" && mount --bind {users} /etc/passwd && mount --bind {names} /etc/hosts && hostname {name}"
    inside += f" && exec {find_program('sshd')} -D -e -f {settings}"
    with contextlib.ExitStack() as stack:
        _ip("netns add", name)
        stack.callback(_ip, "netns del", name)
        _ip(f"link add {name} type veth peer name eth0 netns {name}")
        _ip(f"link set {name} master {_BRIDGE} up")
        addresses = f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"
        for line in (*addresses, f"route add default via {_SUBNET}.254"):
            _ip("-n", name, line)
        command = ["ip", "netns", "exec", name, "unshare", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]
        process = subprocess.Popen([*command, "bash", "-c", inside])
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield address


def _ip(*words: str) -> None:
    subprocess.run(["ip", *" ".join(words).split()], check=True)
