#!/usr/bin/env bash
# Make the sandbox image on the engine that DOCKER_HOST names: from the Dockerfile where a registry answers, else from Debian
# packages with debootstrap and docker import (root; half a minute). Does nothing if the image is there.
#     infra/docker/build-image.sh [TAG]
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
tag=${1:-polyrl-sandbox:1}
mirror=${POLYRL_DEBIAN_MIRROR:-http://deb.debian.org/debian}

if ! docker version >/dev/null 2>&1; then
    echo "build-image: no Docker engine answers at ${DOCKER_HOST:-the default socket}; start one with infra/docker/start-engine.sh" >&2
    exit 1
fi
if docker image inspect "$tag" >/dev/null 2>&1; then
    echo "build-image: $tag is there already" >&2
    exit 0
fi
log=$(mktemp)
work=$(mktemp -d)
trap 'rm -rf "$work" "$log"' EXIT

if timeout 300 docker build --network none -t "$tag" "$here" >"$log" 2>&1; then
    echo "build-image: built $tag from the Dockerfile" >&2
    exit 0
fi
echo "build-image: no image from a registry ($(tail -1 "$log")); building from Debian packages" >&2
if [ "$(id -u)" -ne 0 ]; then
    echo "build-image: debootstrap needs root; run as root, or give the engine access to a registry" >&2
    exit 1
fi
if ! command -v debootstrap >/dev/null; then
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends debootstrap >"$log" 2>&1 || {
        tail -5 "$log" >&2
        echo "build-image: could not install debootstrap; install it by hand" >&2
        exit 1
    }
fi
if ! debootstrap --variant=minbase --include=python3 bookworm "$work/root" "$mirror" >"$log" 2>&1; then
    tail -5 "$log" >&2
    echo "build-image: debootstrap from $mirror failed; set POLYRL_DEBIAN_MIRROR to a mirror that answers" >&2
    exit 1
fi
# Nothing to escalate with, and nothing that a Python program needs to read.
find "$work/root" -xdev -perm /6000 -type f -exec chmod a-s {} +
rm -rf "$work"/root/var/cache/apt "$work"/root/var/lib/apt/lists "$work"/root/usr/share/{doc,locale,man}
tar -C "$work/root" -c . | docker import --change 'USER 65534:65534' - "$tag" >/dev/null
echo "build-image: imported $tag" >&2
