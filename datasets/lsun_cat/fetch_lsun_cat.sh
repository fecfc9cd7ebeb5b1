#!/usr/bin/env bash
# Fetches and prepares cat256 into datasets/cat256, the form that training reads. Stopped, it goes on where it was when called again.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../../scripts/find_cmlab.sh"
exec "$cmlab" data prepare cat256 "$@"
