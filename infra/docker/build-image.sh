#!/usr/bin/env bash
# Make the sandbox image on the engine that DOCKER_HOST names, from the Dockerfile beside this file: on Python's own image where a
# registry answers, else on a base of Debian packages (debootstrap and docker import; root; half a minute). Does nothing if the
# image is there.
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

build() { timeout 300 docker build --network none -t "$tag" "$@" "$here" >"$log" 2>&1; }

if build; then
    echo "build-image: built $tag from the Dockerfile" >&2
    exit 0
fi
echo "build-image: no image from a registry ($(tail -1 "$log")); taking Debian packages" >&2
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
base=polyrl-sandbox-base:1
tar -C "$work/root" -c --exclude=./var/cache/apt --exclude=./var/lib/apt/lists --exclude="./usr/share/doc/*" --exclude="./usr/share/locale/*" . |
    docker import - "$base" >/dev/null
if ! build --build-arg "BASE=$base"; then
    tail -5 "$log" >&2
    echo "build-image: the Dockerfile failed on $base" >&2
    exit 1
fi
echo "build-image: built $tag from the Dockerfile, on Debian packages" >&2
