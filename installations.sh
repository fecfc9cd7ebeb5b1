#!/usr/bin/env bash
# Sets up cmlab: a Python environment with the torch build that fits this machine, the package, and its tests' tools.
# Runs on Linux and macOS (bash 3.2). Versions are bounded in pyproject.toml; only the table of torch builds is here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

PYTORCH=https://download.pytorch.org/whl
REFERENCE_URL=${REFERENCE_URL:-https://github.com/openai/consistency_models.git}
OLDEST_PYTHON=3.10

# The newest build that runs under a driver of at least that CUDA version. "newest": as new as the index has it.
# A CUDA 11.8 build runs under any driver of CUDA 11 or later. CUDA 12.6 is the last that knows GPUs before Turing.
torch_builds() {
    cat <<'TABLE'
13.2  cu132  newest  newest
13.0  cu130  newest  newest
12.8  cu128  2.11.0  0.26.0
12.6  cu126  newest  newest
12.4  cu124  2.6.0   0.21.0
11.0  cu118  2.7.1   0.22.1
TABLE
}
# Columns: driver's CUDA at least, wheel index under $PYTORCH, torch, torchvision.

usage() {
    cat <<'HELP'
bash installations.sh [--system] [--with-reference] [--plan]

Makes .venv beside this file and installs cmlab there (editable), with all that its notebooks and tests need.

  --system          install into the current interpreter instead (Gradient, Colab, an active conda environment)
  --with-reference  also clone the original consistency_models repository, for the tests that compare with it
  --plan            tell what would be installed and why, then stop
  -h, --help        this text

Environment:
  TORCH_INDEX_URL   take torch and torchvision from this index, whatever the machine has
                    (example: TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126)
  REFERENCE_URL     where --with-reference clones from (a path will do)
  PYTHON            the interpreter to start from (default: python3; Python 3.10 or newer);
                    one of another version than .venv has makes .venv anew
  CMLAB_NEED_GB     free disk space to insist on, in GB (default: 8 for a torch with CUDA, 3 for one without,
                    1 where torch is there already)
HELP
}

say() { printf '%-8s %s\n' "$1" "$2"; }

fail() { printf 'error: %s\n' "$1" >&2; exit 1; }

read_options() {
    system=no reference=no plan=no
    while [ $# -gt 0 ]; do
        case $1 in
            --system) system=yes ;;
            --with-reference) reference=yes ;;
            --plan) plan=yes ;;
            -h | --help) usage; exit 0 ;;
            *) fail "unknown option $1; known: --system, --with-reference, --plan, --help" ;;
        esac
        shift
    done
}

# 12.4 -> 1204, so that versions compare as numbers
as_number() { local minor=${1#*.}; echo $((${1%%.*} * 100 + ${minor%%.*})); }

python_version() { "$1" --version 2>&1 | sed -n 's/.*Python \([0-9][0-9]*\.[0-9][0-9]*\).*/\1/p' | head -n 1; }

# ---- Python

# Sets python (the one to ask), its version, and exists: whether that is the environment to install into.
find_python() {
    local there=''
    python=${PYTHON:-python3} exists=$system
    if [ "$system" = no ]; then there=$(python_version .venv/bin/python 2>/dev/null || true); fi
    if [ -n "$there" ] && [ "$there" = "$(python_version "${PYTHON:-.venv/bin/python}" || true)" ]; then
        python=.venv/bin/python exists=yes
    fi
    command -v "$python" >/dev/null || fail "no $python found; install Python $OLDEST_PYTHON or newer, or name one: PYTHON=/path/to/python3 bash installations.sh"
    version=$(python_version "$python" || true)
    [ -n "$version" ] || fail "$python --version does not tell a Python version; name another interpreter with PYTHON="
    if [ "$(as_number "$version")" -lt "$(as_number "$OLDEST_PYTHON")" ]; then
        fail "$python is Python $version, too old: cmlab needs Python $OLDEST_PYTHON or newer; name one with PYTHON=/path/to/python3"
    fi
    if [ "$system" = yes ]; then say Python "$version, the current interpreter ($(command -v "$python"))"; else say Python "$version, in .venv"; fi
}

make_environment() {
    if [ "$exists" = no ]; then
        "$python" -m venv --clear .venv || fail "$python cannot make .venv (see above); on Debian and Ubuntu: apt-get install python3-venv"
        python=.venv/bin/python
    fi
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip >/dev/null 2>&1 || fail "$python has no pip; install it: $python -m ensurepip"
}

# ---- the GPU: the driver's CUDA version is the limit; a toolkit's (nvcc) only speaks where the driver is silent

toolkit_version() {
    command -v nvcc >/dev/null || return 0
    nvcc --version 2>/dev/null | sed -n 's/.*release \([0-9][0-9]*\.[0-9][0-9]*\).*/\1/p' | head -n 1 || true
}

oldest_capability() {
    nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -E '^ *[0-9]+\.[0-9]+ *$' | sort -n | head -n 1 | tr -d ' ' || true
}

look_for_gpu() {
    local toolkit answer
    cuda='' capability='' toolkit=$(toolkit_version)
    if ! command -v nvidia-smi >/dev/null; then
        if [ -n "$toolkit" ]; then
            say GPU "none: nvcc has CUDA $toolkit, but there is no nvidia-smi, so no driver and no GPU to run on"
        else
            say GPU "none: neither nvidia-smi nor nvcc is on PATH"
        fi
        return
    fi
    if ! answer=$(nvidia-smi 2>&1); then
        say GPU "none: nvidia-smi is there but finds no working driver"
        return
    fi
    cuda=$(printf '%s\n' "$answer" | sed -n 's/.*CUDA[A-Za-z ]* Version *: *\([0-9][0-9]*\.[0-9][0-9]*\).*/\1/p' | head -n 1)
    capability=$(oldest_capability)
    if [ -z "$cuda" ]; then
        cuda=${toolkit:-11.0}
        say GPU "NVIDIA; nvidia-smi tells no CUDA version, so CUDA $cuda is assumed${toolkit:+ (that of nvcc)}"
    else
        say GPU "NVIDIA${capability:+, compute capability $capability}; nvidia-smi: the driver runs CUDA up to $cuda${toolkit:+ (nvcc has $toolkit, which does not matter: torch brings its own)}"
    fi
}

# ---- which torch

requirement() { sed -n "s/^ *\"\($1[<>=!~][^\"]*\)\".*/\1/p" pyproject.toml; }

pick_cuda_build() {
    local limit least index torch vision
    limit=$(as_number "$cuda")
    because="the newest build for a driver that runs CUDA up to $cuda"
    if [ -n "$capability" ] && [ "$(as_number "$capability")" -lt 705 ] && [ "$limit" -gt 1206 ]; then
        limit=1206
        because="the last CUDA line with code for a GPU of compute capability $capability (older than Turing, 7.5)"
    fi
    while read -r least index torch vision; do
        [ "$limit" -ge "$(as_number "$least")" ] || continue
        url=$PYTORCH/$index
        if [ "$torch" != newest ]; then specs=("torch==$torch" "torchvision==$vision"); fi
        gpu=yes
        return
    done <<TABLE
$(torch_builds)
TABLE
}

# Sets specs (what pip is asked for), url (empty: pip's own index) and because (the reason that is told).
choose_torch() {
    specs=("$(requirement torch)" "$(requirement torchvision)") url='' gpu=no
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        url=$TORCH_INDEX_URL because="TORCH_INDEX_URL says so"
        return
    fi
    if [ -n "$cuda" ]; then
        pick_cuda_build
        if [ "$gpu" = yes ]; then return; fi
        say GPU "not used: no torch build runs under a driver of CUDA $cuda; a driver for CUDA 11.0 or later would do"
    fi
    if [ "$(uname)" = Darwin ]; then
        because="its macOS build needs no CUDA"
    else
        url=$PYTORCH/cpu because="no usable NVIDIA GPU, and the CPU build is a fifth of a gigabyte"
    fi
}

answers() {
    if command -v curl >/dev/null; then
        curl --silent --location --output /dev/null --max-time 6 "$1/"
    else
        "$python" -c 'import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=6)' "$1/" 2>/dev/null
    fi
}

# No answer within seconds: the package index's build where it would run, else an end with one clear line.
settle_index() {
    case $url in http://* | https://*) ;; *) return 0 ;; esac
    if answers "$url"; then return; fi
    [ -z "${TORCH_INDEX_URL:-}" ] || fail "TORCH_INDEX_URL=$url does not answer; check the address and the network"
    if [ "$gpu" = yes ] && [ "$(as_number "$cuda")" -lt 1300 ]; then
        fail "$url does not answer, and the package index's torch needs a newer driver than CUDA $cuda; try again later, or name a mirror with TORCH_INDEX_URL="
    fi
    because="$url does not answer within seconds; this one is some 5 GB, with CUDA, and runs on a CPU too"
    url=''
}

# ---- what is there already

# Exit 0 when this Python's torch and torchvision meet pyproject's bounds, import together and, with "yes", reach the GPU.
torch_works() {
    "$python" - "$(requirement torch)" "$(requirement torchvision)" "$1" >/dev/null 2>&1 <<'PY'
import sys
from importlib.metadata import version
from pip._vendor.packaging.requirements import Requirement
for text in sys.argv[1:3]:
    wanted = Requirement(text)
    if not wanted.specifier.contains(version(wanted.name), prereleases=True):
        sys.exit(1)
import torch, torchvision
if sys.argv[3] == "yes":
    torch.ones(1, device="cuda").add(1).cpu()
PY
}

# Exit 0 when cmlab is installed from this folder and every requirement of it is there in a version within its bounds.
rest_is_whole() {
    "$python" - "$PWD" >/dev/null 2>&1 <<'PY'
import sys
from importlib.metadata import requires, version
from importlib.util import find_spec
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement
sys.path[:] = [entry for entry in sys.path if entry]  # the installed one, not what lies in the current folder
if Path(find_spec("cmlab").origin).resolve().parent.parent != Path(sys.argv[1]).resolve():
    sys.exit(1)
for wanted in map(Requirement, requires("cmlab")):
    if wanted.marker is None or wanted.marker.evaluate({"extra": "test"}):
        if not wanted.specifier.contains(version(wanted.name), prereleases=True):
            sys.exit(1)
PY
}

stamp_file() { echo "$("$python" -c 'import sys; print(sys.prefix)')/.cmlab-installed"; }

stamp() { echo "$(cat pyproject.toml installations.sh | cksum) $version cuda=$cuda capability=$capability index=${TORCH_INDEX_URL:-}"; }

nothing_to_do() {
    [ "$(cat "$(stamp_file)" 2>/dev/null)" = "$(stamp)" ] && torch_works no && rest_is_whole
}

# ---- installing

check_disk() {
    local folder=$PWD need=8 free
    if [ "$url" = "$PYTORCH/cpu" ] || [ "$(uname)" = Darwin ]; then need=3; fi
    if [ "$keep" = yes ]; then need=1; fi
    need=${CMLAB_NEED_GB:-$need}
    if [ "$system" = yes ]; then folder=$("$python" -c 'import sys; print(sys.prefix)'); fi
    free=$(df -Pk "$folder" | awk 'NR == 2 { print int($4 / 1048576) }') || fail "df cannot tell the free space of $folder (see above)"
    if [ "$free" -lt "$need" ]; then fail "disk full: the installation needs $need GB, $free GB are free in $folder; free some space and run this again"; fi
}

# One clear line for what pip says in many.
explain_pip() {
    if grep -q 'No space left on device' "$log"; then fail "disk full: pip ran out of space (see above); free some and run this again"; fi
    if grep -qE 'Failed to establish a new connection|Max retries exceeded|[Nn]ame resolution|Name or service not known|Connection refused|[Tt]imed out' "$log"; then
        fail "the package index does not answer (see above)${1:+: $1}; check the network and pip's settings, then run this again"
    fi
    if grep -q 'externally-managed-environment' "$log"; then fail "this interpreter is managed by the operating system; leave out --system, or activate an environment first"; fi
    if grep -q 'No matching distribution' "$log"; then fail "${1:-the package index} has no fitting build for Python $version (see above); torch's older CUDA builds end at Python 3.13: PYTHON=python3.12 bash installations.sh"; fi
    fail "pip could not install $2 (see above)"
}

install_torch() {
    local arguments=("${specs[@]}")
    if [ -n "$url" ]; then arguments+=(--index-url "$url"); fi
    if [ "$replace" = yes ]; then arguments+=(--force-reinstall); fi
    "$python" -m pip install --disable-pip-version-check --retries 2 --log "$log" "${arguments[@]}" || explain_pip "$url" "torch and torchvision"
    torch_works no || fail "torch and torchvision are installed but do not work together here; see: $python -c 'import torch, torchvision'"
    if [ "$gpu" = yes ] && ! torch_works yes; then say GPU "this torch cannot reach it and will run on the CPU; see: $python -c 'import torch; torch.ones(1).cuda()'"; fi
}

# The constraint keeps pip from exchanging the torch that was just picked.
install_rest() {
    local constraints=$scratch/constraints.txt
    "$python" -c 'from importlib.metadata import version as v; print(*(f"{p}=={v(p)}" for p in ("torch", "torchvision")), sep="\n")' >"$constraints"
    say cmlab "installing the package and what the series needs (a few minutes the first time)"
    "$python" -m pip install --quiet --disable-pip-version-check --retries 2 --log "$log" --constraint "$constraints" --editable '.[test]' || explain_pip '' "cmlab"
    rest_is_whole || fail "pip is done but the environment is not whole; see: $python -m pip check"
}

# A torch that is there stays if it does its work; TORCH_INDEX_URL asks for another all the same.
decide_torch() {
    keep=no replace=$exists
    if [ "$exists" = yes ] && [ -z "${TORCH_INDEX_URL:-}" ] && torch_works "$gpu"; then
        keep=yes
        say torch "$("$python" -c 'import torch; print(torch.__version__)') is there and works: kept"
    else
        settle_index
        say torch "${specs[*]} from ${url:-the package index}: $because"
    fi
}

install_everything() {
    check_disk
    scratch=$(mktemp -d) log=$scratch/pip.log
    trap 'rm -rf "$scratch"' EXIT
    touch "$log"
    make_environment
    if [ "$keep" = no ]; then install_torch; fi
    install_rest
    stamp >"$(stamp_file)" 2>/dev/null || true    # a prefix we may not write to: the next run asks pip again
}

clone_reference() {
    if [ -d consistency_models ]; then say original "consistency_models is there"; return; fi
    command -v git >/dev/null || fail "--with-reference needs git"
    GIT_TERMINAL_PROMPT=0 git clone --quiet "$REFERENCE_URL" consistency_models || fail "could not clone $REFERENCE_URL (see above); name another source with REFERENCE_URL="
    say original "cloned from $REFERENCE_URL into consistency_models/"
}

say_done() {
    if [ "$system" = yes ]; then say ready "next: cmlab tour, or: jupyter lab notebooks"; else say ready "next: .venv/bin/cmlab tour, or: .venv/bin/jupyter lab notebooks"; fi
}

main() {
    read_options "$@"
    find_python
    look_for_gpu
    choose_torch
    if [ "$plan" = no ] && [ "$exists" = yes ] && nothing_to_do; then
        say cmlab "everything is in place, nothing to install"
    else
        decide_torch
        if [ "$plan" = yes ]; then exit 0; fi
        install_everything
    fi
    if [ "$reference" = yes ]; then clone_reference; fi
    say_done
}

main "$@"
