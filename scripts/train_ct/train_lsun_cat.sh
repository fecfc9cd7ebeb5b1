#!/usr/bin/env bash
# Trains a consistency model on LSUN Cat 256x256 without a teacher. All options of cmlab train may follow: --dry-run, --smoke, --micro-batches N …
# PROCESSES=8 starts one process a GPU; LAUNCH holds further options of accelerate launch (machines, addresses).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../find_cmlab.sh"
launch ct-cat256 "$@"
