#!/usr/bin/env bash
# Fetches released checkpoints into this folder: fetch_checkpoints.sh [name ... | all]. Without a name it lists them.
# Interrupted, it goes on where it stopped; what is here already is only checked.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cmlab="$here/../.venv/bin/cmlab"
[ -x "$cmlab" ] || cmlab="$(command -v cmlab)" || { echo "cmlab is not installed: bash installations.sh" >&2; exit 1; }
CMLAB_CHECKPOINTS="${CMLAB_CHECKPOINTS:-$here}" exec "$cmlab" fetch "$@"
