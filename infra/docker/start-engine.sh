#!/usr/bin/env bash
# Start a Docker engine of our own where none answers, with everything it keeps under one folder:
#     export DOCKER_HOST=$(infra/docker/start-engine.sh STATE_FOLDER)
# Prints the address of the engine and nothing else on stdout. Needs root, and Debian's docker.io where dockerd is missing.
# Containers get no network from it, and programs in the sandbox are to have none. stop-engine.sh STATE_FOLDER ends it.
set -euo pipefail

if [ $# -ne 1 ]; then
    echo "usage: $0 STATE_FOLDER" >&2
    exit 2
fi
mkdir -p "$1"
state=$(cd "$1" && pwd)
socket="$state/docker.sock"
address="unix://$socket"

answers() { curl -fsS --max-time 5 --unix-socket "$socket" http://engine/_ping >/dev/null 2>&1; }

if answers; then
    echo "$address"
    exit 0
fi
# A socket's address holds at most 107 characters.
if [ ${#socket} -gt 100 ]; then
    echo "start-engine: the path $socket is too long for a socket; give a shorter state folder" >&2
    exit 2
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "start-engine: a Docker engine needs root; start one yourself and set DOCKER_HOST, or use sandbox=bubblewrap" >&2
    exit 1
fi
if ! command -v dockerd >/dev/null; then
    echo "start-engine: installing docker.io" >&2
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update -q && apt-get install -q -y --no-install-recommends docker.io curl; } >"$state/install.log" 2>&1 || {
        tail -5 "$state/install.log" >&2
        echo "start-engine: could not install docker.io; install a Docker engine by hand, or use sandbox=bubblewrap" >&2
        exit 1
    }
fi

# The engine lives on: it must not keep open what our caller holds, a lock for example.
for fd in 3 4 5 6 7 8 9; do
    eval "exec $fd>&-"
done
# No bridge and no iptables: both need kernel modules that small machines lack.
setsid dockerd --iptables=false --ip6tables=false --bridge=none --data-root "$state/data" --exec-root "$state/exec" \
    --pidfile "$state/dockerd.pid" -H "$address" >"$state/dockerd.log" 2>&1 </dev/null &
child=$!
for _ in $(seq 120); do
    if answers; then
        echo "$address"
        exit 0
    fi
    if ! kill -0 "$child" 2>/dev/null; then
        break
    fi
    sleep 0.5
done
kill "$child" 2>/dev/null || true
tail -5 "$state/dockerd.log" >&2
echo "start-engine: dockerd did not answer within a minute; its log is $state/dockerd.log" >&2
exit 1
