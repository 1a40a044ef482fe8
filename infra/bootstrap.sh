#!/usr/bin/env bash
# From a bare clone to a working .venv:   infra/bootstrap.sh [cpu|gpu]
# Quick the second time: a stamp in .venv remembers what was installed. PYTHON=... chooses the interpreter of a new .venv.
#
#   python -m venv --> build tools, uv --> torch (a step of its own) --> pinned list --> deepspeed (built here) --> polyrl -e
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

kind=${1:-cpu}
torch_version=2.13.0
deepspeed_version=0.19.8
torch_cpu_index=https://download.pytorch.org/whl/cpu
need_gib=6
venv=.venv

say() { printf 'polyrl setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

case $kind in
    cpu | gpu) ;;
    *) die "unknown kind '$kind'; wanted cpu or gpu" ;;
esac

# --- what was done before -------------------------------------------------------------------------------------------

stamp=$venv/.polyrl-setup
wanted=$({ echo "$kind $PWD"; cat requirements/build.txt "requirements/$kind.txt" requirements/dev.txt requirements/bridges.txt requirements/trackers.txt pyproject.toml infra/bootstrap.sh; } | sha256sum)
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && [ -x $venv/bin/polyrl ]; then
    exit 0
fi

# --- what this machine must have ------------------------------------------------------------------------------------

[ "$(uname -s)" = Linux ] || die "this is $(uname -s), but vLLM and the sandboxes need Linux; use a Linux machine, a virtual machine or WSL 2"
if [ "$kind" = cpu ]; then
    [ "$(uname -m)" = x86_64 ] || die "this processor is $(uname -m), but the pinned CPU builds are for x86_64; use such a machine, or a GPU with 'make setup KIND=gpu'"
    grep -qwE 'avx2|avx512f' /proc/cpuinfo || die "this processor has no AVX2, which the CPU builds of torch and vLLM need; use a processor from 2014 or later"
fi

suits() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }
python=
for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3 python; do
    if suits "$candidate"; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    found=$(python3 --version 2>/dev/null || echo "no Python at all")
    die "Python 3.11, 3.12 or 3.13 is needed, found $found; install one (Debian, Ubuntu: apt install python3.11 python3.11-venv) or name it: make setup PYTHON=/path/to/python3.11"
fi

if [ ! -x $venv/bin/python ] || ! suits $venv/bin/python; then
    free_gib=$(($(df -Pk . | awk 'NR == 2 { print $4 }') / 1048576))
    [ "$free_gib" -ge $need_gib ] || die "$free_gib GiB are free on the disk of $PWD, $need_gib are needed; free some space, or clone onto another disk"
    say "making $venv with $("$python" --version)"
    rm -rf $venv
    "$python" -m venv $venv || die "$python cannot make virtual environments; install its venv module (Debian, Ubuntu: apt install python3-venv)"
fi

# --- install --------------------------------------------------------------------------------------------------------

rm -f "$stamp"
in_venv=$PWD/$venv/bin/python
pip_install() { "$in_venv" -m pip install --quiet --disable-pip-version-check "$@"; }

# uv takes seconds where pip takes minutes, but it knows neither pip's config nor its find-links: pip is there when uv cannot.
install() {
    local find_links=() folder
    for folder in ${PIP_FIND_LINKS:-}; do find_links+=(--find-links "$folder"); done
    "$in_venv" -m uv pip install --quiet --python "$in_venv" "${find_links[@]}" "$@" 2>"$venv/uv.log" && return
    say "uv could not ($(grep -m1 -oE '(error|Caused by|×).*' "$venv/uv.log" || tail -1 "$venv/uv.log")); trying pip, which takes longer"
    pip_install "$@"
}

say "build tools"
pip_install -r requirements/build.txt || die "pip could not install the build tools; is a package index reachable? (pip config list)"

if [ "$kind" = cpu ]; then wheel="torch==$torch_version+cpu"; else wheel="torch==$torch_version"; fi
if ! "$in_venv" -c "import importlib.metadata as m, sys; sys.exit('torch==' + m.version('torch') != '$wheel')" 2>/dev/null; then
    say "$wheel"
    # First as this machine is configured (its own index, PIP_FIND_LINKS); only then from the network of the PyTorch project.
    if ! pip_install --no-deps "$wheel" 2>"$venv/torch.log"; then
        [ "$kind" = cpu ] || die "pip could not install $wheel: $(tail -1 "$venv/torch.log")"
        pip_install --no-deps --index-url "$torch_cpu_index" "$wheel" ||
            die "pip could not install $wheel, neither from the configured index nor from $torch_cpu_index; put the wheel into a folder and name it in PIP_FIND_LINKS"
    fi
fi

say "pinned packages of requirements/$kind.txt"
install --no-deps -r "requirements/$kind.txt" -r requirements/dev.txt || die "the pinned packages could not be installed; see above"

say "packages that the tests of the bridges use"
if ! "$in_venv" -m uv pip install --quiet --python "$in_venv" --no-deps -r requirements/bridges.txt 2>"$venv/bridges.log"; then
    say "without them ($(grep -m1 -oE '(error|Caused by|×).*' "$venv/bridges.log" || tail -1 "$venv/bridges.log")): their tests will be skipped"
fi

say "trackers: TensorBoard, Weights & Biases, MLflow"
if ! "$in_venv" -m uv pip install --quiet --python "$in_venv" --no-deps -r requirements/trackers.txt 2>"$venv/trackers.log"; then
    say "without them ($(grep -m1 -oE '(error|Caused by|×).*' "$venv/trackers.log" || tail -1 "$venv/trackers.log")): pip install 'polyrl[trackers]' adds them later"
fi

say "deepspeed $deepspeed_version, built against this torch"
export DS_BUILD_OPS=0 DS_ACCELERATOR=$([ "$kind" = cpu ] && echo cpu || echo cuda)
install --no-deps --no-build-isolation "deepspeed==$deepspeed_version" || die "deepspeed could not be built; see above"

say "polyrl itself"
install --no-deps --no-build-isolation -e . || die "polyrl itself could not be installed; see above"
$venv/bin/polyrl --help >/dev/null || die "everything is installed, but the polyrl command does not start; see above"
rm -f $venv/uv.log $venv/torch.log $venv/bridges.log $venv/trackers.log
echo "$wanted" >"$stamp"
say "done: $venv/bin/polyrl"
