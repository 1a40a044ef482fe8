#!/usr/bin/env bash
# End the Docker engine that start-engine.sh started in STATE_FOLDER, by its process id, and delete its data with --purge.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: $0 STATE_FOLDER [--purge]" >&2
    exit 2
fi
state=$1
if [ -f "$state/dockerd.pid" ]; then
    pid=$(cat "$state/dockerd.pid")
    # The id may belong to somebody else by now: only a dockerd with our state folder is ours.
    if tr '\0' ' ' <"/proc/$pid/cmdline" 2>/dev/null | grep -qF -- "--exec-root $(cd "$state" && pwd)/exec"; then
        kill "$pid"
        for _ in $(seq 60); do
            kill -0 "$pid" 2>/dev/null || break
            sleep 0.5
        done
        if kill -0 "$pid" 2>/dev/null; then
            echo "stop-engine: dockerd ($pid) still runs after 30 s" >&2
            exit 1
        fi
    fi
fi
if [ "${2:-}" = --purge ]; then
    rm -rf "$state/data" "$state/exec"
fi
