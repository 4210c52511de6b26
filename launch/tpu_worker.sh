#!/usr/bin/env bash
# Runs on each worker of a Cloud TPU VM, called by tpu_vm.sh through ssh.
#
# Usage: launch/tpu_worker.sh COMMAND [FLAGS of evit_jax.main]
#
#   install    creates .venv with requirements.txt, JAX's TPU plugin of the same version, and gcsfs
#   start      starts evit_jax.main with the flags, detached; the log is train.log
#   stop       asks evit_jax.main to save and end
#   logs       follows train.log
#   status     prints whether evit_jax.main runs, and the last line of the log
#   supervise  runs evit_jax.main, again after each exit with code 75 (preempted, saved); used by start
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
[[ ${1-} != --help ]] || { print_help && exit; }
cd "$root"

# is_running: sets `pid` if a supervisor runs. After a reboot, the number may belong to another program.
is_running() {
  pid=$(cat train.pid 2>/dev/null) && grep -qs tpu_worker.sh "/proc/$pid/cmdline"
}

install() {
  local jax
  jax=$(sed -n 's/^jax==//p' requirements.txt)
  # uv downloads a Python if the image has none of a suitable version.
  python3 -m pip install --quiet --upgrade --target .uv uv
  .uv/bin/uv venv --quiet --clear --python '>=3.11,<3.14' .venv
  .uv/bin/uv pip install --quiet --python .venv -r requirements.txt "jax[tpu]==$jax" gcsfs
  .venv/bin/python -c 'import jax; print("JAX", jax.__version__, "is installed")'
}

start() {
  if is_running; then
    echo "evit_jax.main runs already, as process $pid: stop it first" >&2
    exit 1
  fi
  [[ -x .venv/bin/python ]] || { echo 'there is no .venv here: run setup first' >&2 && exit 1; }
  setsid nohup bash launch/tpu_worker.sh supervise "$@" >>train.log 2>&1 </dev/null &
  echo $! >train.pid
  echo "started, as process $!"
}

supervise() {
  local program='' code stopped=''
  trap 'stopped=yes; [[ -z $program ]] || kill -s TERM "$program" || true' TERM INT
  while [[ -z $stopped ]]; do
    .venv/bin/python -m evit_jax.main "$@" &
    program=$!
    code=0
    wait "$program" || code=$?
    # A signal ends `wait` while the program is still saving.
    while kill -0 "$program" 2>/dev/null; do
      code=0
      wait "$program" || code=$?
    done
    echo "tpu_worker.sh: evit_jax.main ended with exit code $code"
    ((code == PREEMPTED)) || exit "$code"
  done
  exit "$PREEMPTED"
}

case ${1:-} in
  install | start | supervise) "$@" ;;
  stop)
    if is_running; then
      kill -s TERM "$pid"
      echo "process $pid was asked to save and end: see the log"
    else
      echo 'evit_jax.main does not run'
    fi
    ;;
  logs) exec tail -n 100 -F train.log ;;
  status)
    if is_running; then echo "evit_jax.main runs, as process $pid"; else echo 'evit_jax.main does not run'; fi
    tail -n 1 train.log 2>/dev/null || true
    ;;
  *) refuse "${1:-nothing} is not one of install, start, stop, logs, status, supervise: see --help" ;;
esac
