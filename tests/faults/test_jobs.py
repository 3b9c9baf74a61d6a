"""cluster/local.sh as its user meets it: three nodes and a token, a sweep as a job, a node that is killed, and who is not let in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from iclgd_dist.store import read_results
from tests.faults.case import ICLGD, Case, same_results

pytestmark = [pytest.mark.slow, pytest.mark.long]
ROOT = Path(__file__).parent.parent.parent
PORT, DASHBOARD = 26380, 28265


@dataclass
class Local:
    folder: Path
    environment: dict[str, str]

    def iclgd(self, *arguments: str, seconds: float = 300, **more: str) -> tuple[int, str]:
        done = subprocess.run(
            [*ICLGD, *arguments], cwd=ROOT, env=self.environment | more, capture_output=True, text=True, timeout=seconds
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    folder = Path(f"/tmp/iclgd-test-{os.getpid()}")  # short: Ray puts sockets below it
    places = {"ICLGD_LOCAL_DIR": str(folder), "ICLGD_LOCAL_PORT": str(PORT), "ICLGD_LOCAL_DASHBOARD_PORT": str(DASHBOARD)}
    environment = {name: value for name, value in os.environ.items() if name not in ("RAY_AUTH_TOKEN", "RAY_ADDRESS")} | places
    subprocess.run(["bash", str(ROOT / "cluster" / "local.sh"), "up"], env=environment, check=True, timeout=180)
    exported = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "auth_token"), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    yield Local(folder, environment | exported)
    subprocess.run(["bash", str(ROOT / "cluster" / "local.sh"), "down"], env=environment, check=True, timeout=60)
    assert not folder.exists()


def _answer(token: str | None) -> int:
    request = urllib.request.Request(f"http://127.0.0.1:{DASHBOARD}/api/jobs/", headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        return int(urllib.request.urlopen(request, timeout=20).status)
    except urllib.error.HTTPError as error:
        return error.code


def test_only_who_has_the_token_gets_in(local: Local) -> None:
    token = local.folder / "auth_token"
    assert token.stat().st_mode & 0o777 == 0o600 and local.folder.stat().st_mode & 0o777 == 0o700
    assert (_answer(None), _answer("0" * 64), _answer(token.read_text())) == (401, 403, 200)
    code, said = local.iclgd("status", "--address", f"http://127.0.0.1:{DASHBOARD}", RAY_AUTH_TOKEN="0" * 64)
    assert code == 2 and "token" in said.lower(), said
    code, said = local.iclgd(
        "run", str(ROOT / "cluster" / "smoke.toml"), "--address", f"127.0.0.1:{PORT}", "--store", str(local.folder / "x"), RAY_AUTH_TOKEN="0" * 64
    )
    assert code == 2 and "Traceback" not in said, said


def test_a_node_with_a_wrong_token_cannot_join(local: Local) -> None:
    script = (ROOT / "cluster" / "local.sh").read_text().partition("ray_start='")[2].partition("'")[0]
    command = [sys.executable, "-c", script, "start", "--block", f"--address=127.0.0.1:{PORT}", "--num-cpus=1", "--min-worker-port=0", "--max-worker-port=0"]
    command += ["--dashboard-agent-listen-port=0", f"--temp-dir={local.folder}"]
    stranger = subprocess.Popen(
        command, env=local.environment | {"RAY_AUTH_TOKEN": "0" * 64}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = stranger.communicate(timeout=90)
        assert stranger.returncode != 0, said
    except subprocess.TimeoutExpired:
        os.killpg(stranger.pid, signal.SIGKILL)
        stranger.wait()
    count = f"import ray; ray.init(address='127.0.0.1:{PORT}', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    alive = subprocess.run([sys.executable, "-c", count], env=local.environment, capture_output=True, text=True, timeout=60, check=True).stdout
    assert alive.split()[-1] == "3"


def test_a_sweep_is_one_job_and_a_node_that_is_killed_changes_nothing_in_the_tables(local: Local, case: Case) -> None:
    case.write(seeds=list(range(1, 13)))
    text = case.file.read_text().replace('source = "model"', f'source = "{case.folder / "model"}"')
    case.file.write_text(text)
    case.plot({"what": "slow", "seconds": 0.3, "times": 200})
    dashboard, store = f"http://127.0.0.1:{DASHBOARD}", str(case.store.root)
    submit = ("submit", str(case.file), "--address", dashboard, "--store", store)
    code, said = local.iclgd(*submit, "--no-wait", ICLGD_CACHE=str(case.folder / "cache"))
    assert code == 0 and "submitted iclgd-accident-" in said, said
    code, said = local.iclgd(*submit, "--no-wait")
    assert code == 0 and "runs already: iclgd-accident-" in said, said
    case.drivers.clear()
    case.wait(lambda: len(case.committed()) >= 6)
    code, said = local.iclgd("status", "--address", dashboard)
    assert code == 0 and "running" in said, said
    before = case.committed()
    os.kill(int((local.folder / "worker2.pid").read_text()), signal.SIGKILL)
    case.facts["injections"] = 1
    code, said = local.iclgd(*submit)
    assert code == 0 and "succeeded" in said, said
    assert case.attempts("lost"), "it ran a block"
    assert case.store.keys() == set(case.plan().keys)
    clean, _ = case.clean()
    same_results(read_results(case.store), clean)
    now = case.committed()
    assert all(now[key] == data for key, data in before.items())
    for path in local.folder.rglob("*"):
        if path.is_file() and path.name != "auth_token" and path.stat().st_size < 10_000_000:
            assert (local.folder / "auth_token").read_bytes() not in path.read_bytes(), f"{path} holds the token"


def test_a_job_is_stopped_in_order_and_submitted_again_it_goes_on(local: Local, case: Case) -> None:
    text = case.file.read_text().replace('source = "model"', f'source = "{case.folder / "model"}"').replace("max_actors = 2", "max_actors = 1")
    case.file.write_text(text)
    case.plot({"what": "slow", "seconds": 5, "times": 200})
    dashboard = f"http://127.0.0.1:{DASHBOARD}"
    where = ("--address", dashboard, "--store", str(case.store.root))
    assert local.iclgd("submit", str(case.file), *where, "--no-wait")[0] == 0
    case.wait(lambda: len(list(case.folder.glob("happened-*"))) == 3)  # the second block has begun, and takes ten seconds
    before = time.monotonic()
    code, said = local.iclgd("stop", str(case.file), *where)
    assert code == 0 and "stopped" in said and time.monotonic() - before < 40, said
    assert 0 < len(case.store.keys()) < len(set(case.plan().keys))
    assert case.attempts("interrupted"), "its actor ended in order"
    case.plot()
    code, said = local.iclgd("submit", str(case.file), *where)
    assert code == 0, said
    assert case.store.keys() == set(case.plan().keys)
