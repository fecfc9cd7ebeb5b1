#!/usr/bin/env bash
# Distils the released EDM teacher of LSUN Cat 256x256 with LPIPS. All options of cmlab train may follow: --dry-run, --smoke, --micro-batches N …
# PROCESSES=8 starts one process a GPU; LAUNCH holds further options of accelerate launch (machines, addresses).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../find_cmlab.sh"
launch cd-cat256-lpips "$@"
