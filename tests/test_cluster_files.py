"""The files of cluster/: what can be known of them without a cloud, a Slurm or a Kubernetes. Stand-ins take the places of Ray, srun and scontrol."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from iclgd_dist.config import load_sweep
from iclgd_dist.plan import count_cells

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
LAUNCHED = ("aws.yaml", "gcp.yaml")
KUBERAY = ("kubernetes/raycluster.yaml", "kubernetes/rayjob.yaml")
SECRET = re.compile(r"\b[0-9a-f]{32,}\b|\bhf_\w{20,}|\bAKIA[0-9A-Z]{16}\b|BEGIN [A-Z ]*PRIVATE KEY")


def read(name: str) -> str:
    return (CLUSTER / name).read_text()


def commands(name: str) -> str:
    """Return a file without its comments, so that what only a comment says is not taken for done."""
    return "\n".join(line for line in read(name).splitlines() if not line.lstrip().startswith("#"))


def ray_cluster(name: str) -> dict[str, Any]:
    spec = yaml.safe_load(read(name))["spec"]
    return spec.get("rayClusterSpec", spec)


def pods(name: str) -> Iterator[dict[str, Any]]:
    cluster = ray_cluster(name)
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield group["template"]


def until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def put_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}")
    path.chmod(0o755)


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_accepts_the_launcher_files(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(config := prepare_config(yaml.safe_load(read(name))))
    with pytest.raises(Exception, match="'surprise'"):
        validate_config(config | {"surprise": 1})


@pytest.mark.parametrize("name", LAUNCHED)
def test_every_start_of_ray_by_the_launcher_has_the_token_and_a_closed_dashboard(name: str) -> None:
    config = yaml.safe_load(read(name))
    head, worker = ([command for command in config[f"{kind}_start_ray_commands"] if "ray start" in command] for kind in ("head", "worker"))
    assert len(head) == len(worker) == 1
    token = next(remote for remote in config["file_mounts"] if remote.startswith("~/.iclgd/"))
    for command in head + worker:
        assert f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token.replace('~', '$HOME')}/auth_token " in command
    assert "--dashboard-host=127.0.0.1" in head[0]
    assert f"chmod 700 ~/.iclgd {token} && chmod 600 {token}/auth_token" in config["setup_commands"]


@pytest.mark.parametrize("name", LAUNCHED)
def test_the_launcher_copies_what_is_there_and_installs_exact_versions_for_workers_that_can_be_taken_away(name: str) -> None:
    config = yaml.safe_load(read(name))
    assert [local for local in config["file_mounts"].values() if not local.startswith("~") and not (ROOT / local).exists()] == []
    installs = " ".join(config["setup_commands"])
    assert "--constraint ~/iclgd/constraints/python.txt" in installs and "--require-hashes --requirement ~/iclgd/constraints/embedded.txt" in installs
    nodes = {kind: node["node_config"] for kind, node in config["available_node_types"].items()}
    spot = [kind for kind, node in nodes.items() if "spot" in str(node.get("InstanceMarketOptions", node.get("scheduling"))).lower()]
    assert spot == ["gpu"] and config["head_node_type"] == "head" and config["idle_timeout_minutes"] > 0
    assert all(node["SecurityGroupIds"] if name == "aws.yaml" else node["networkInterfaces"] for node in nodes.values())


@pytest.mark.parametrize("name", KUBERAY)
def test_a_cluster_on_kubernetes_asks_for_a_token_and_holds_none(name: str) -> None:
    document, cluster = yaml.safe_load(read(name)), ray_cluster(name)
    assert document["apiVersion"] == "ray.io/v1" and document["kind"] == ("RayJob" if "job" in name else "RayCluster")
    assert cluster["authOptions"] == {"mode": "token"} and cluster["rayVersion"] == pinned("ray")
    for pod in pods(name):
        for variable in pod["spec"]["containers"][0]["env"]:
            assert not variable["name"].startswith("RAY_AUTH") and ("TOKEN" not in variable["name"] or "value" not in variable), variable


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_are_confined_take_what_they_ask_for_and_have_time_to_drain(name: str) -> None:
    policy = next(d for d in yaml.safe_load_all(read("kubernetes/shared.yaml")) if d["kind"] == "NetworkPolicy")["spec"]
    for pod in pods(name):
        spec, container = pod["spec"], pod["spec"]["containers"][0]
        assert pod["metadata"]["labels"].items() >= policy["podSelector"]["matchLabels"].items()
        assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"] == container["resources"]["limits"]
        drain = {variable["name"]: variable.get("value") for variable in container["env"]}["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"]
        assert 0 < int(drain) <= spec["terminationGracePeriodSeconds"] / 2
        assert [volume["persistentVolumeClaim"]["claimName"] for volume in spec["volumes"]] == ["iclgd-shared"]
    workers = ray_cluster(name)["workerGroupSpecs"][0]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    gpu = workers["template"]["spec"]
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1" and gpu["tolerations"]


def test_both_files_for_kubernetes_describe_the_same_cluster() -> None:
    assert ray_cluster(KUBERAY[0]) == ray_cluster(KUBERAY[1])


def test_the_volume_is_one_that_all_nodes_can_write() -> None:
    volume = next(d for d in yaml.safe_load_all(read("kubernetes/shared.yaml")) if d["kind"] == "PersistentVolumeClaim")
    assert volume["metadata"]["name"] == "iclgd-shared" and volume["spec"]["accessModes"] == ["ReadWriteMany"]


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch", *LAUNCHED, *KUBERAY])
def test_every_recipe_turns_the_token_on(name: str) -> None:
    turned_on = "authOptions:\n    " if name in KUBERAY else " RAY_AUTH_MODE=token " if name in LAUNCHED else "\nexport RAY_AUTH_MODE=token\n"
    assert turned_on in commands(name)
    assert "--dashboard-host=127.0.0.1" in commands(name) or name in KUBERAY


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CLUSTER)))
def test_no_file_holds_a_secret_and_each_has_a_row_in_the_readme(path: Path) -> None:
    assert SECRET.findall(path.read_text()) == []
    rows = re.findall(r"^\| (`.*?`) \|", read("README.md"), re.MULTILINE)
    assert path.name == "README.md" or any(f"`{path.relative_to(CLUSTER)}`" in row for row in rows)


@pytest.mark.parametrize("text", ["0f" * 32, "hf_" + "a" * 34, "AKIA" + "A" * 16, "-----BEGIN OPENSSH PRIVATE KEY-----"])
def test_a_planted_secret_is_found(text: str) -> None:
    assert SECRET.search(f"RAY_AUTH_TOKEN={text}\n")


def test_files_named_in_the_readme_exist() -> None:
    named = set(re.findall(r"`([\w./-]+\.(?:sh|sbatch|yaml|toml|md|py)|Dockerfile[\w.]*)`", read("README.md")))
    assert len(named) > 8 and {name for name in named if not (CLUSTER / name).exists() and not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch"])
def test_bash_reads_the_scripts(name: str) -> None:
    assert subprocess.run(["bash", "-n", str(CLUSTER / name)], capture_output=True, text=True).stderr == ""
    assert "\nset -euo pipefail\n" in read(name)


def test_the_smoke_sweep_is_as_small_as_it_says() -> None:
    cells = count_cells(load_sweep(CLUSTER / "smoke.toml"))[0]
    assert 10 <= cells <= 20 and f"= {cells} cells" in read("smoke.toml") and f"sweep of {cells} cells" in read("README.md")


def test_the_image_has_exact_versions_and_no_root() -> None:
    lines = commands("Dockerfile")
    assert "--constraint constraints/python.txt" in lines and "--require-hashes --requirement constraints/embedded.txt" in lines
    assert lines.index("USER 1000:1000") > lines.rindex("\nRUN ")
    copied = {name for line in re.findall(r"^COPY (.*) \S+$", lines, re.MULTILINE) for name in line.split()}
    assert copied == set(re.findall(r"^!(\S+)$", read("Dockerfile.dockerignore"), re.MULTILINE)) and all((ROOT / name).exists() for name in copied)


def pinned(package: str) -> str:
    return re.search(rf"^{package}==(\S+)$", (ROOT / "constraints/python.txt").read_text(), re.MULTILINE)[1]


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Run local.sh with a stand-in for Python: as Ray it starts a process that does not heed SIGTERM, says that it has started, and sleeps."""
    ray = f'(trap "" TERM; exec sleep 600) & echo "$!" >> {tmp_path}/children; echo "Ray runtime started."; exec -a "$*" sleep 600'
    put_program(tmp_path / "python", f'case "$*" in *secrets*) exec {sys.executable} "$@" ;; *" start "*) {ray} ;; esac')
    ports = {"ICLGD_LOCAL_PORT": "46380", "ICLGD_LOCAL_DASHBOARD_PORT": "48265"}

    def run(word: str, **more: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | ports | {"PYTHON": str(tmp_path / "python"), "ICLGD_LOCAL_DIR": str(tmp_path / "state")} | more
        return subprocess.run(["bash", str(CLUSTER / "local.sh"), *word.split()], env=environment, capture_output=True, text=True, timeout=60)

    yield run
    if (tmp_path / "state").exists():
        run("down")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_local_starts_three_nodes_behind_a_private_token_and_ends_them_alone(local: Callable[..., Any], tmp_path: Path) -> None:
    up = local("up", RAY_AUTH_TOKEN="of another cluster")
    assert up.returncode == 0, up.stderr
    state = tmp_path / "state"
    token = (state / "auth_token").read_text()
    assert re.fullmatch("[0-9a-f]{64}", token) and token not in up.stdout + up.stderr
    assert (mode(state), mode(state / "auth_token")) == (0o700, 0o600)
    assert f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={state}/auth_token RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0" in up.stdout
    pids = {name: int((state / f"{name}.pid").read_text()) for name in ("head", "worker1", "worker2")}
    assert all(map(is_alive, pids.values())) and all(os.getpgid(pid) == pid for pid in pids.values())
    for name, pid in pids.items():
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"RAY_AUTH_MODE=token" in environment and b"of another cluster" not in environment
        command = Path(f"/proc/{pid}/cmdline").read_text()
        assert ("--head" in command) == (name == "head")
        assert f"--temp-dir={state}/{name}" in command  # nodes that share one take a job's files from each other
    assert "cannot make" in local("up").stderr, "a second cluster leaves the first alone"
    assert all(map(is_alive, pids.values()))
    other = subprocess.Popen(["sleep", "600"])
    (state / "worker2.pid").write_text(str(other.pid))  # as if the number had been given to another process
    children = [int(pid) for pid in (tmp_path / "children").read_text().split()]
    os.kill(pids["worker2"], signal.SIGKILL)
    assert len(children) == 3 and all(map(is_alive, children))
    assert local("down").returncode == 0 and not state.exists()
    assert not any(map(is_alive, (pids["head"], pids["worker1"], *children[:2]))) and other.poll() is None
    os.killpg(pids["worker2"], signal.SIGKILL)  # which had lost its number
    other.kill()
    other.wait()


def test_local_leaves_nothing_behind_when_a_node_does_not_start(local: Callable[..., Any], tmp_path: Path) -> None:
    put_program(tmp_path / "python", 'case "$*" in *" start "*) echo "port in use"; exit 1 ;; *) echo -n token ;; esac')
    up = local("up")
    assert up.returncode == 1 and "port in use" in up.stderr and "the head has not started" in up.stderr
    assert not (tmp_path / "state").exists()


def test_local_says_how_it_is_used(local: Callable[..., Any]) -> None:
    assert [local(word).returncode for word in ("", "sideways", "down")] == [2, 2, 1]


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start slurm.sbatch with stand-ins; `iclgd` ends with the code it is given, or with 75 when it is asked to stop."""
    told = tmp_path / "told"
    put_program(tmp_path / "bin/srun", 'while [[ $1 == -* ]]; do shift; done\n"$@" || { code=$?; [[ $1 == ray ]] && exit 137; exit $code; }')
    put_program(tmp_path / "bin/ray", f'echo "ray $*" >> {told}\nwhile [[ $1 != -- ]]; do shift; done\nshift\nexec "$@"')
    put_program(tmp_path / "bin/iclgd", f'echo "iclgd $*" >> {told}\ntrap "exit 75" TERM\n[[ $CODE ]] && exit "$CODE"\nwhile :; do sleep 0.1; done')
    put_program(tmp_path / "bin/scontrol", f'[[ $1 == show ]] && echo node1 || echo "scontrol $*" >> {told}')
    put_program(tmp_path / "bin/squeue", 'echo "$STATE"')
    put_program(tmp_path / "bin/hostname", "echo 10.0.0.1 172.17.0.1")
    put_program(tmp_path / "bin/sleep", 'exec /bin/sleep "$( (( ${1%%.*} > 1 )) && echo 0 || echo "$1")"')
    put_program(tmp_path / ".venv/bin/activate", "")
    (tmp_path / "bin/python").symlink_to(sys.executable)

    jobs = []

    def start(code: str = "", state: str = "RUNNING") -> subprocess.Popen[str]:
        given = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "8", "SLURM_GPUS_ON_NODE": "4"}
        environment = os.environ | given | {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CODE": code, "STATE": state}
        command = ["bash", str(CLUSTER / "slurm.sbatch"), "a.toml", "/shared/a", "--yes"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        jobs.append(subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True, **pipes))
        return jobs[-1]

    yield start
    for job in jobs:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


def test_slurm_starts_one_ray_node_a_node_and_the_driver_and_returns_its_code(slurm: Callable[..., Any], tmp_path: Path) -> None:
    job = slurm(code="3")
    assert job.wait(timeout=30) == 3, job.stderr.read()
    ray, driver = (tmp_path / "told").read_text().splitlines()
    assert ray.startswith("ray symmetric-run --address 10.0.0.1:6379 --min-nodes 2 --num-cpus=8 --num-gpus=4 --dashboard-host=127.0.0.1 -- ")
    assert driver == "iclgd run a.toml --address 10.0.0.1:6379 --store /shared/a --yes"
    assert not (tmp_path / ".iclgd/slurm-7").exists(), "the token goes with the job"


def test_slurm_does_not_call_done_what_ray_never_started(slurm: Callable[..., Any], tmp_path: Path) -> None:
    put_program(tmp_path / "bin/ray", "exit 0")  # as symmetric-run does where `ray start` failed
    job = slurm(code="0")
    _, said = job.communicate(timeout=60)
    assert job.returncode == 1 and "Ray did not start" in said


@pytest.mark.parametrize(("state", "requeued"), [("RUNNING", True), ("CANCELLED", False)])
def test_slurm_stops_the_driver_and_requeues_unless_cancelled(slurm: Callable[..., Any], tmp_path: Path, state: str, requeued: bool) -> None:
    job, private = slurm(state=state), tmp_path / ".iclgd/slurm-7"
    until(lambda: (private / "driver.pid").exists() and "iclgd run" in (tmp_path / "told").read_text())
    assert (mode(private), mode(private / "auth_token")) == (0o700, 0o600)
    time.sleep(0.3)  # the stand-in sets its trap
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 75, job.stderr.read()
    assert ("scontrol requeue 7" in (tmp_path / "told").read_text()) == requeued


@pytest.mark.parametrize(
    ("file", "name", "recipe"),
    [
        ("scripts/symmetric_run.py", "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT", "slurm.sbatch"),
        ("scripts/symmetric_run.py", "--min-nodes", "slurm.sbatch"),
        ("_common/utils.py", "RAY_TMPDIR", "slurm.sbatch"),
        ("scripts/scripts.py", "--dashboard-agent-listen-port", "local.sh"),
        ("scripts/scripts.py", "--ray-client-server-port", "local.sh"),
        ("scripts/scripts.py", "Ray runtime started", "local.sh"),
        ("scripts/scripts.py", "ray_constants.ENABLE_RAY_CLUSTER", "local.sh"),
        ("_private/services.py", "get_node_ip_address", "local.sh"),
        ("_private/ray_constants.py", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "local.sh"),
        ("_private/ray_constants.py", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "local.sh"),
        ("autoscaler/sdk/__init__.py", "request_resources", "aws.yaml"),
    ],
)
def test_what_a_recipe_leans_on_is_in_this_ray(file: str, name: str, recipe: str) -> None:
    import ray

    assert name in (Path(ray.__file__).parent / file).read_text() and name in read(recipe)
