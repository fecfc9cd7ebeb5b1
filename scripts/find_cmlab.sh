# Sourced by the other scripts: sets $cmlab to the command of this repository's .venv, or else to the one on PATH.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cmlab="$root/.venv/bin/cmlab"
[ -x "$cmlab" ] || cmlab="$(command -v cmlab)" || { echo "cmlab is not installed: bash $root/installations.sh" >&2; exit 1; }
