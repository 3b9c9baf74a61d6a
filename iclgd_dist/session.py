"""A connection to Ray: on this machine for loopback only, or to a cluster whose nodes are looked at first. Knows Ray, tokens and nodes; knows nothing of blocks."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from iclgd_dist.claims import unreachable
from iclgd_dist.config import Resources, SweepError
from iclgd_dist.store import Store, StoreError

PREFLIGHT_SECONDS = 60.0
LEFT_OUT: dict[str, str] = {}  # id of a node -> why no new actor goes there

# Ray reads these when it is first imported; what the user has set stands.
for _name, _value in {
    "RAY_AUTH_MODE": "token",  # never leave open what runs code for whoever reaches it
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",  # an actor that asks for no GPU sees none
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # ours turns Ctrl-C into an orderly stop with its own exit code
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}.items():
    os.environ.setdefault(_name, _value)


def check_place(resources: Resources, address: str | None, *, is_open: bool = False) -> None:
    """Raise SweepError where this machine alone cannot hold one actor, or no cluster is at `address`; asked before anything is written or started."""
    if address is None:
        check_cpus(resources)
        check_gpus(resources)
    else:
        require_token(is_open=is_open)
        require_answer(_of_cluster(address))


def check_cluster(resources: Resources, address: str, *, is_open: bool = False) -> None:
    """Raise SweepError where no cluster is at `address`, or no node of it is large enough for an actor."""
    check_place(resources, address, is_open=is_open)
    with connected(address, is_open=is_open):
        require_room(resources)


def check_cpus(resources: Resources) -> None:
    """Raise SweepError where this machine has fewer CPUs than an actor needs."""
    _require("cpus_per_actor", resources.cpus_per_actor, len(os.sched_getaffinity(0)))


def check_gpus(resources: Resources) -> None:
    """Raise SweepError where this machine has fewer GPUs than an actor needs. Imports torch if it needs any."""
    if resources.gpus_per_actor:
        from iclgd_dist.machine import num_gpus

        _require("gpus_per_actor", resources.gpus_per_actor, num_gpus())


def _require(name: str, wanted: int, here: int) -> None:
    if wanted > here:
        raise SweepError(f"[resources] {name} = {wanted}, but this machine has {here}; lower it, or give --address of a cluster")


def _of_cluster(address: str) -> str:
    """Return an address as Ray takes it. Errors: SweepError for that of a dashboard, or one without a port."""
    if address.startswith(("http://", "https://")):
        raise SweepError(f"--address must be that of the cluster itself, auto or host:port (often 6379), got {address!r}; `iclgd submit` takes the dashboard's")
    if "://" not in address and address not in ("auto", "local") and not address.rpartition(":")[2].isdigit():
        raise SweepError(f"--address must be auto or host:port, e.g. 10.0.0.1:6379, got {address!r}")
    return address


def require_answer(address: str, seconds: float = 5.0) -> None:
    """Raise SweepError when nothing listens at host:port: Ray itself would try for minutes."""
    host, _, port = address.partition("://")[2 if "://" in address else 0].rpartition(":")
    if not port.isdigit():  # "auto", or a name that Ray resolves
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=seconds).close()
    except OSError as error:
        raise SweepError(f"no Ray cluster answers at {address}: {error.strerror or error}") from None


def require_token(*, is_open: bool) -> None:
    """Raise SweepError where a cluster would be used without a token, unless the user wants that."""
    if os.environ["RAY_AUTH_MODE"] != "token" and not is_open:
        raise SweepError(
            f"RAY_AUTH_MODE = {os.environ['RAY_AUTH_MODE']}: Ray runs code for whoever reaches its ports; "
            "start the cluster with RAY_AUTH_MODE=token, or add --insecure-no-auth"
        )


def said_by_ray(error: BaseException) -> str:
    """Return an error of Ray's in one line; in our words where no token was found."""
    if "no authentication token was found" in str(error):
        return "no token was found; export RAY_AUTH_TOKEN_PATH as on its nodes (`cluster/local.sh up` prints it). Without --address, Ray starts on this machine"
    return " ".join(str(error).split())[:400]


@contextlib.contextmanager
def connected(address: str | None, *, is_open: bool = False) -> Iterator[str]:
    """Connect to a cluster, or start Ray on this machine for loopback only; yields host:port of the head. Handlers of signals stay as they are.

    `is_open`: without a token.
    """
    if address is not None:
        require_token(is_open=is_open)
        require_answer(address)
    if address is None or address.startswith(("127.", "localhost:")):
        # Otherwise Ray turns 127.0.0.1 into this machine's public address, to listen there and to look for the cluster there.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    if address is None and os.environ["RAY_AUTH_MODE"] == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # of this run alone: never written to a file
    import ray
    from ray.exceptions import RayError

    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "configure_logging": True}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if address is None:
            ray.init(address="local", include_dashboard=False, _node_ip_address="127.0.0.1", **quiet)
        else:
            ray.init(address=address, **quiet)
    except SystemExit as end:  # Ray's own handler, which is there while it starts
        if end.code == signal.SIGTERM and callable(ours := handlers[signal.SIGTERM]):
            ours(signal.SIGTERM, None)
        raise
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        raise SweepError(f"no Ray cluster answers at {address or 'this machine'}: {said_by_ray(error)}") from error
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():  # Ray has put its own in their place
            signal.signal(number, handler)
    LEFT_OUT.clear()
    try:
        yield str(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()


def nodes() -> list[dict[str, Any]]:
    """Return the nodes that are alive, as Ray describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def num_slots(resources: Resources) -> int:
    """Return how many actors the cluster holds as it is now, on nodes that are not left out."""
    return sum(_slots(node["Resources"], resources) for node in nodes() if node["NodeID"] not in LEFT_OUT)


def require_room(resources: Resources) -> None:
    """Raise SweepError where no node is large enough for an actor, instead of waiting for one for ever."""
    offered = [node["Resources"] for node in nodes()]
    for name, wanted in (("CPU", resources.cpus_per_actor), ("GPU", resources.gpus_per_actor)):
        most = max((node.get(name, 0) for node in offered), default=0)
        if wanted > most:
            what = f"{name.lower()}s_per_actor"
            raise SweepError(f"[resources] {what} = {wanted}, but no node of the cluster has more than {most:.0f}; lower it or use larger nodes")
    if not any(_slots(node, resources) for node in offered):
        raise SweepError(f"[resources] {resources.cpus_per_actor} CPUs and {resources.gpus_per_actor} GPUs per actor: no single node of the cluster has both")


def _slots(node: dict[str, float], resources: Resources) -> int:
    slots = int(node.get("CPU", 0) // resources.cpus_per_actor)
    return min(slots, int(node.get("GPU", 0) // resources.gpus_per_actor)) if resources.gpus_per_actor else slots


def preflight(store: Store, run: str, seconds: float = PREFLIGHT_SECONDS) -> None:
    """Let every node import this package, see the file that says this run is under way, and write to the store itself.

    Errors: SweepError with the node's name for what is missing there; StoreError where it does not reach the store.
    """
    import ray

    asked = {_asked(node, store, run): node for node in nodes()}
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
    if slow := [node for node in map(asked.__getitem__, late) if _is_alive(node)]:
        raise SweepError(f"node {_name_of(slow[0])} did not start a task within {seconds:.0f} s; take it out of the cluster, or try again")
    for answer in ready:
        try:
            problem = ray.get(answer)
        except Exception as error:
            if not _is_alive(asked[answer]):
                continue
            raise SweepError(f"node {_name_of(asked[answer])}: {_root_cause(error)}; install this project there, the same version as here") from None
        if problem:
            raise StoreError(f"is not shared with node {_name_of(asked[answer])}: {problem}", store.root, way_out="use a store that every node sees")


class Newcomers:
    """Looks at nodes that join while a sweep runs, as `preflight` does at those that are there, and leaves out what cannot hold an actor."""

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.run = store, run
        self.known = {node["NodeID"] for node in nodes()}
        self.asked: dict[Any, dict[str, Any]] = {}

    def look(self) -> Iterator[str]:
        """Ask those that are new, and yield a sentence for each that was found wanting since."""
        import ray

        for node in nodes():
            if node["NodeID"] not in self.known:
                self.known.add(node["NodeID"])
                self.asked[_asked(node, self.store, self.run)] = node
        for answer in ray.wait(list(self.asked), num_returns=len(self.asked), timeout=0)[0] if self.asked else ():
            node = self.asked.pop(answer)
            try:
                problem = ray.get(answer)
            except Exception as error:
                problem = _root_cause(error) if _is_alive(node) else ""
            if problem:
                yield leave_out(node["NodeID"], problem, name=_name_of(node))


def leave_out(node_id: str, why: str, *, name: str = "") -> str:
    """Let no new actor go to a node, and return a sentence that says so; an empty text where it was left out already."""
    if node_id in LEFT_OUT:
        return ""
    LEFT_OUT[node_id] = why
    return f"node {name or next((_name_of(node) for node in nodes() if node['NodeID'] == node_id), node_id[:8])} is left out from now on: {why}"


def place(bundle: dict[str, float], _config: dict[str, Any]) -> Any:
    """Return where Tune may put an actor: on any node that is not left out."""
    from ray.tune.execution.placement_groups import PlacementGroupFactory

    away: dict[str, Any] = {"bundle_label_selector": [{"ray.io/node-id": f"!in({', '.join(sorted(LEFT_OUT))})"}]} if LEFT_OUT else {}
    return PlacementGroupFactory([bundle], **away)


def _asked(node: dict[str, Any], store: Store, run: str) -> Any:
    """Let a node look at the store; return what its answer comes in."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(_look).options(scheduling_strategy=there).remote(str(store.root.absolute()), run)


def _look(root: str, run: str) -> str:
    """Run on a node: say what is wrong with its view of the store; an empty text is well."""
    return unreachable(Store(root), run)


def _name_of(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"


def _is_alive(node: dict[str, Any]) -> bool:
    return any(each["NodeID"] == node["NodeID"] for each in nodes())


def _root_cause(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]
