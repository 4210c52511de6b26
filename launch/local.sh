#!/usr/bin/env bash
# Trains in several processes on this machine, each with its own virtual CPU devices, like a small pod.
#
# Usage: launch/local.sh [options] --config NAME --workdir DIR [-- FLAGS of evit_jax.main]
#
#   --processes N      number of processes (2)
#   --devices N        number of virtual CPU devices of each process (4)
#   --config NAME      a recipe (digits) or its file (configs/digits.py)
#   --workdir DIR      folder of the run
#   --grace SECONDS    time from the first failure or signal to SIGKILL for the remaining processes (60)
#   --python PROGRAM   the Python to use (.venv/bin/python if there is one, else python3)
#   --program PROGRAM  runs this program with the arguments after --, instead of evit_jax.main
#   --dry-run          prints the commands and runs nothing
#
# Paths are relative to the repository. Each line of output begins with the number of its process. SIGTERM and SIGINT
# are forwarded to all processes. When one fails, the others get SIGTERM; the exit code is that of the first failure.
#
# Examples:
#   launch/local.sh --config configs/digits.py --workdir runs/two
#   launch/local.sh --processes 4 --devices 2 --config configs/digits.py --workdir runs/four -- --config.keep.rate=0.5
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
need_bash 5 1

processes=2 devices=4 config='' workdir='' grace=60 python='' program=''
read_options 'processes: devices: config: workdir: grace: python: program:' "$@"
no_words
cd "$root"
check_number processes 1 64
check_number devices 1 64
check_number grace 0 86400
if [[ $program ]]; then
  [[ -z $config$workdir ]] || refuse '--program takes its arguments after --, not from --config and --workdir'
  line=("$program" ${passed[@]+"${passed[@]}"})
else
  read_run
  [[ $python || ! -x $root/.venv/bin/python ]] || python=$root/.venv/bin/python
  line=("${python:-python3}" -m evit_jax.main "${flags[@]}")
fi
command -v "${line[0]}" >/dev/null || refuse "${line[0]} is not a program: give another as --program or --python"

# free_port: prints a free port, below the range that Linux and macOS use for outgoing connections.
free_port() {
  local port
  while :; do
    port=$((20000 + RANDOM % 10000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || break
  done
  echo "$port"
}

# prefix_lines NUMBER: copies lines, each after the number of its process; also a last line without a line end.
prefix_lines() {
  local text
  trap '' TERM INT
  while IFS= read -r text || [[ $text ]]; do
    printf '[%s] %s\n' "$1" "$text"
  done
}

# signal_all SIGNAL: signals the programs. They end their own children.
signal_all() {
  local pid
  for pid in "${!number_of[@]}"; do
    kill -s "$1" "$pid" 2>/dev/null || true
  done
}

# end_all SIGNAL: signals the programs, and sets the deadline for SIGKILL at the first call.
end_all() {
  signal_all "$1"
  deadline=${deadline:-$((SECONDS + grace))}
}

# any_alive ID...: succeeds if one of the processes, or process groups (-ID), is alive.
any_alive() {
  local id
  for id; do
    ! kill -0 -- "$id" 2>/dev/null || return 0
  done
  return 1
}

# wait_briefly ID...: waits at most two seconds until all of them have ended.
wait_briefly() {
  local tries
  for ((tries = 0; tries < 20; tries++)); do
    any_alive "$@" || return 0
    sleep 0.1 || true
  done
}

# start NUMBER: starts a process that leads its own group. Ctrl-C then reaches it through this script alone, and its
# children can be found.
start() {
  local output
  exec {output}> >(prefix_lines "$1")
  readers+=("$!")
  set -m
  env "${shared[@]}" "PROCESS_ID=$1" "${line[@]}" >&"$output" 2>&1 </dev/null &
  set +m
  number_of[$!]=$1 groups+=("-$!")
  exec {output}>&-
}

# note_end PID: handles the end of a program.
note_end() {
  local code=0 number=${number_of[$1]}
  wait "$1" 2>/dev/null || code=$?
  unset "number_of[$1]"
  ((code)) || return 0
  echo "${0##*/}: process $number ended with exit code $code" >&2
  ((first)) || first=$code
  end_all TERM
}

shared=("COORDINATOR_ADDRESS=127.0.0.1:$(free_port)" "NUM_PROCESSES=$processes" JAX_PLATFORMS=cpu
  JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo
  "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")

if [[ $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    run env "${shared[@]}" "PROCESS_ID=$i" "${line[@]}"
  done
  exit
fi

declare -A number_of=()  # process numbers by process id
groups=() readers=() deadline='' first=0
trap 'end_all TERM' TERM
trap 'end_all INT' INT
for ((i = 0; i < processes; i++)); do
  start "$i"
done

# This polls, because `wait -n` misses a child that ended before the call.
while ((${#number_of[@]})); do
  sleep 0.1 || true  # Ctrl-C ends it
  for pid in "${!number_of[@]}"; do
    any_alive "$pid" || note_end "$pid"
  done
  if [[ $deadline ]] && ((SECONDS > deadline && ${#number_of[@]})); then
    echo "${0##*/}: not ended in --grace=$grace seconds, killed: ${number_of[*]}" >&2
    signal_all KILL
    deadline=$((SECONDS + grace))
  fi
done

# Ends the data workers of a killed program. Python's resource tracker cleans up after them, then ends too.
kill -s TERM -- "${groups[@]}" 2>/dev/null || true
wait_briefly "${groups[@]}"
kill -s KILL -- "${groups[@]}" 2>/dev/null || true
wait_briefly "${readers[@]}"
exit "$first"
