#!/usr/bin/env bash
# End the Docker engine that start-engine.sh started in STATE_FOLDER, by its process id, and delete its data with --purge.
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "usage: $0 STATE_FOLDER [--purge]" >&2
    exit 2
fi
state=$1
cmdline() { { tr '\0' ' ' <"/proc/$1/cmdline"; } 2>/dev/null || true; }

if [ -f "$state/dockerd.pid" ]; then
    pid=$(cat "$state/dockerd.pid")
    # The id may belong to somebody else by now: only a dockerd with our state folder is ours.
    if cmdline "$pid" | grep -qF -- "--exec-root $(cd "$state" && pwd)/exec"; then
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
# An engine that was killed leaves its containerd, a shim with the processes of every container, and mounts. All name our state folder.
if [ -d "$state" ]; then
    folder=$(cd "$state" && pwd)
    mark="$folder/exec/containerd/"
    for directory in /proc/[0-9]*; do
        pid=${directory#/proc/}
        if cmdline "$pid" | grep -qE -- "^[^ ]*containerd.* $mark"; then
            children=$(cat "$directory"/task/*/children 2>/dev/null || true)
            # shellcheck disable=SC2086
            kill -KILL "$pid" $children 2>/dev/null || true
        fi
    done
    awk -v folder="$folder/" 'index($2, folder) == 1 { print $2 }' /proc/mounts | sort -r | while read -r mounted; do
        umount "$mounted" 2>/dev/null || umount --lazy "$mounted" 2>/dev/null || true
    done
fi
if [ "${2:-}" = --purge ]; then
    rm -rf "$state/data" "$state/exec"
fi
