#!/usr/bin/env bash
# One Ray head and two workers on this machine, on loopback only: to try clusters, `iclgd submit` and lost nodes without a cluster.
#
#   cluster/local.sh up      starts the three nodes, then prints what other shells export and the next commands
#   cluster/local.sh down    ends these three nodes, nothing else, and deletes their logs and their token
#
# Between the two, a node that is taken away (the other one finishes the sweep):
#   kill -TERM "$(cat /tmp/iclgd-local-$UID/worker2.pid)"    with notice: it drains for up to 10 s
#   kill -KILL "$(cat /tmp/iclgd-local-$UID/worker2.pid)"    without
#
# Linux, with the project set up (`make setup`). ICLGD_LOCAL_DIR, ICLGD_LOCAL_PORT, ICLGD_LOCAL_DASHBOARD_PORT, ICLGD_LOCAL_CPUS and PYTHON replace the defaults
# below: sweeps/demo.toml, whose actor has two CPUs, needs ICLGD_LOCAL_CPUS=2.
# Tried by tests/faults/test_jobs.py (`make faults`), and by tests/test_cluster_files.py with a stand-in for Ray.
set -euo pipefail
umask 077

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
state=${ICLGD_LOCAL_DIR:-/tmp/iclgd-local-$UID} # short: Ray puts sockets below it, whose paths may have 107 bytes
port=${ICLGD_LOCAL_PORT:-6380}
dashboard_port=${ICLGD_LOCAL_DASHBOARD_PORT:-8265}
cpus=${ICLGD_LOCAL_CPUS:-1} # of each worker, as Ray counts them
start_seconds=60
stop_seconds=15 # more than the 10 s of draining

unset RAY_ADDRESS RAY_AUTH_TOKEN # they would win over what is exported here
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN_PATH=$state/auth_token
export RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0 # else Ray takes this machine's public address for 127.0.0.1
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=10
export RAY_USAGE_STATS_ENABLED=0
export PYTHONUNBUFFERED=1
export PATH=${python%/*}:$PATH # a job starts with the first `python` there

# `ray start`, for 127.0.0.1. With the variable above at 0 Ray stays on loopback but refuses a second node; without it a second node works, on the public
# address. These two lines take one half of each.
ray_start='
import ray._private.ray_constants, ray._private.services, ray.scripts.scripts
ray._private.ray_constants.ENABLE_RAY_CLUSTER = True
ray._private.services.get_node_ip_address = lambda address=None: "127.0.0.1"
ray.scripts.scripts.main()
'

fail() {
  echo "cluster/local.sh: $*" >&2
  exit 1
}

answers() { (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null; }

is_running() { # name: whether the process of that node is there and is the one that `up` started
  [[ -r $state/$1.pid ]] && grep -qzF -- "--temp-dir=$state/$1" "/proc/$(<"$state/$1.pid")/cmdline" 2>/dev/null
}

start_node() { # name, options of ray start
  local name=$1 waited pid
  shift
  # A directory of its own: in a shared one the second node unpacks a job's files anew, and takes them from under the driver that runs there.
  # setsid: a process group of its own, whose number is the pid. Ports: all that Ray would give to every node alike are left to the system.
  setsid "$python" -c "$ray_start" start --block --temp-dir="$state/$name" --num-gpus=0 --object-store-memory=200000000 \
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 "$@" </dev/null >"$state/$name.log" 2>&1 &
  pid=$!
  echo "$pid" >"$state/$name.pid"
  for ((waited = 0; waited < 5 * start_seconds; waited++)); do
    if grep -q 'Ray runtime started' "$state/$name.log" 2>/dev/null; then return; fi
    if ! kill -0 "$pid" 2>/dev/null; then break; fi
    sleep 0.2
  done
  tail -n 20 "$state/$name.log" >&2
  fail "the $name has not started; the end of its log is above"
}

stop_nodes() { # names: SIGTERM to each, then SIGKILL to the process group of what is left
  local name pid waited pids=()
  for name in "$@"; do
    if is_running "$name"; then
      pids+=("$(<"$state/$name.pid")")
      kill -TERM "${pids[-1]}" 2>/dev/null || true
    fi
  done
  for ((waited = 0; waited < 5 * stop_seconds; waited++)); do
    if ((${#pids[@]} == 0)) || ! kill -0 "${pids[@]}" 2>/dev/null; then break; fi
    sleep 0.2
  done
  for pid in "${pids[@]}"; do
    kill -KILL -- "-$pid" 2>/dev/null || true # what the node left behind
  done
}

down() {
  stop_nodes worker1 worker2
  stop_nodes head
  rm -rf -- "$state"
  echo "in shells that had its exports: unset RAY_AUTH_MODE RAY_AUTH_TOKEN_PATH RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
}

up() {
  [[ $(uname -s) == Linux ]] || fail "needs Linux"
  [[ -x $python ]] || fail "no $python; run \`make setup\` first, or set PYTHON"
  if answers "$port"; then fail "port $port is taken; set ICLGD_LOCAL_PORT"; fi
  if answers "$dashboard_port"; then fail "port $dashboard_port is taken; set ICLGD_LOCAL_DASHBOARD_PORT"; fi
  mkdir -m 700 "$state" 2>/dev/null || fail "cannot make $state; if it is there, a cluster of yours runs or was left: cluster/local.sh down"
  trap down EXIT # until all three are alive
  "$python" -c 'import secrets; print(secrets.token_hex(32), end="")' >"$RAY_AUTH_TOKEN_PATH"

  echo "starting a head and two workers: half a minute"
  start_node head --head --node-ip-address=127.0.0.1 --port="$port" --ray-client-server-port="$((port + 1))" \
    --dashboard-host=127.0.0.1 --dashboard-port="$dashboard_port" --num-cpus=0
  start_node worker1 --address="127.0.0.1:$port" --num-cpus="$cpus"
  start_node worker2 --address="127.0.0.1:$port" --num-cpus="$cpus" # after the first: both would choose the same names of sockets
  timeout "$start_seconds" "$python" - "127.0.0.1:$port" <<'PY' || fail "the head does not report three nodes"
import sys
import time

import ray

ray.init(address=sys.argv[1], logging_level="ERROR", log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < 3:
    time.sleep(0.5)
PY
  trap - EXIT

  cat <<EOF
three nodes are alive. In every shell that talks to them:
  unset RAY_ADDRESS RAY_AUTH_TOKEN
  export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$RAY_AUTH_TOKEN_PATH RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
next, in the project's directory:
  .venv/bin/iclgd run cluster/smoke.toml --address 127.0.0.1:$port --store results/smoke
  .venv/bin/iclgd submit cluster/smoke.toml --address http://127.0.0.1:$dashboard_port --store "\$PWD/results/smoke-submitted"
  cluster/local.sh down
EOF
}

case "${1-}" in
up) up ;;
down)
  [[ -d $state && ! -L $state && -O $state ]] || fail "nothing to end: no directory $state of yours"
  down
  ;;
*)
  echo "usage: cluster/local.sh up | down" >&2
  exit 2
  ;;
esac
