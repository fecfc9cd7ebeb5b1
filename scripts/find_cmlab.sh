# Sourced by the other scripts: sets $cmlab to the command of this repository's .venv, or else to the one on PATH.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cmlab="$root/.venv/bin/cmlab"
[ -x "$cmlab" ] || cmlab="$(command -v cmlab)" || { echo "cmlab is not installed: bash $root/installations.sh" >&2; exit 1; }

# launch RECIPE [option …]: cmlab train, in as many processes as PROCESSES says; it goes on by itself after a stop.
launch() {
    local recipe="$1"; shift
    [[ "${PROCESSES:-1}" =~ ^[1-9][0-9]*$ ]] || { echo "PROCESSES must be a whole number from 1 on, got $PROCESSES" >&2; exit 1; }
    local training=(train "$recipe" --output "${OUTPUT:-$root/runs/$recipe}" --resume auto "$@")
    [ "${PROCESSES:-1}" = 1 ] && [ -z "${LAUNCH:-}" ] && exec "$cmlab" "${training[@]}"
    case " $* " in
        *" --smoke "* | *" --dry-run "*) ;;
        *)  # found out here, by one process: what torchrun prints would bury it
            local missing
            missing="$(WORLD_SIZE=1 "$cmlab" train "$recipe" "$@" --dry-run | sed -n 's/^missing  */cmlab: /p')"
            [ -z "$missing" ] || { echo "$missing" >&2; exit 1; } ;;
    esac
    local python="${cmlab%/*}/python"
    [ -x "$python" ] || python="$(command -v python3)"
    local several=--multi_gpu
    [ "${PROCESSES:-1}" != 1 ] || several=
    exec "$python" -m accelerate.commands.launch $several --num_machines 1 --mixed_precision no --dynamo_backend no \
        --num_processes "${PROCESSES:-1}" ${LAUNCH:-} -m cmlab.cli "${training[@]}"
}
