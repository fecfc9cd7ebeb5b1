#!/usr/bin/env bash
# Fetches released checkpoints into this folder: fetch_checkpoints.sh [name ... | all]. Without a name it lists them.
# Interrupted, it goes on where it stopped; what is here already is only checked.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/find_cmlab.sh"
export CMLAB_CHECKPOINTS="${CMLAB_CHECKPOINTS:-$root/checkpoints}"
exec "$cmlab" fetch "$@"
