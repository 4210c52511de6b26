#!/usr/bin/env bash
# Trains on a Cloud TPU VM, which is requested as a queued resource.
#
# Usage: launch/tpu_vm.sh COMMAND --name NAME --zone ZONE [options] [-- FLAGS of evit_jax.main]
#
#   create   requests the TPU and waits until it is ACTIVE; deletes a preempted TPU of this name first
#   setup    copies a commit of this repository to all workers and installs its requirements
#   start    starts evit_jax.main on all workers, detached; restarts it after each exit with code 75
#   stop     asks evit_jax.main to save and end
#   logs     follows the log of one worker, or of all
#   status   shows the state of the TPU and, if it is ACTIVE, of each worker
#   delete   deletes the TPU and the request
#
#   --name NAME         name of the TPU and of its request
#   --zone ZONE         zone of the TPU
#   --project PROJECT   project of the TPU (gcloud's default)
#   --type TYPE         create: v4-N, v5litepod-N, v5p-N or v6e-N, such as v5litepod-8 or v6e-16
#   --runtime VERSION   create: runtime version of the VM (the default of the type)
#   --spot              create: requests a spot TPU, which is cheaper and may be preempted
#   --poll SECONDS      create: time between two queries of the state (15)
#   --commit COMMIT     setup: commit to copy (HEAD)
#   --config NAME       start: a recipe (digits) or its file (configs/digits.py)
#   --workdir DIR       start: folder of the run, gs://BUCKET/... or an absolute path that all workers share
#   --worker N          logs: number of a worker, or all (0)
#   --yes               delete: without confirmation
#   --dry-run           prints the commands and runs nothing
#
# gcloud must be logged in. For more than one worker, run `ssh-add ~/.ssh/google_compute_engine` first.
#
# Examples:
#   launch/tpu_vm.sh create --name evit --zone ZONE --type v5litepod-16 --spot
#   launch/tpu_vm.sh setup --name evit --zone ZONE
#   launch/tpu_vm.sh start --name evit --zone ZONE --config configs/deit_s.py --workdir gs://BUCKET/evit -- --config.seed=1
# After a preemption, the same three commands continue the run.
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
# shellcheck source=launch/tpu_shapes.sh
source "$root/launch/tpu_shapes.sh"
need_bash 4 4

name='' zone='' project='' type='' runtime='' spot='' poll=15 commit=HEAD config='' workdir='' worker=0 yes=''
read_options 'name: zone: project: type: runtime: spot poll: commit: config: workdir: worker: yes' "$@"
choose_command create setup start stop logs status delete
require name zone
check_form name '^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$' 'a name of lower case letters, digits and -, at most 63'
check_form zone '^[a-z]+-[a-z]+[0-9]+-[a-z0-9]+$' 'a zone, as us-west4-a'
location=("--zone=$zone" ${project:+"--project=$project"})
need_tool gcloud 'install the Google Cloud CLI'

queue() {
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$name" "${location[@]}" "$@"
}

# on_workers WORKER ARGUMENT...: runs launch/tpu_worker.sh with the arguments on one worker, or all.
on_workers() {
  local worker=$1
  shift
  run gcloud compute tpus tpu-vm ssh "$name" "${location[@]}" "--worker=$worker" \
    "--command=bash evit_jax/launch/tpu_worker.sh $(quoted "$@")"
}

# state: prints the state of the request; nothing if there is none.
state() {
  queue describe '--format=value(state.state)' 2>/dev/null || true
}

request() {
  queue create "--node-id=$name" "--accelerator-type=$type" "--runtime-version=${runtime:-$default_runtime}" \
    ${spot:+--spot} --async
}

create() {
  require type
  check_accelerator "$type"
  check_number poll 0 3600
  if [[ $dry_run ]]; then
    request
    state
    return
  fi
  case $(state) in
    '') request ;;
    FAILED | SUSPENDED | SUSPENDING)
      echo "$name was preempted, or failed: requesting it again"
      queue delete --force --quiet
      request
      ;;
    *) echo "$name has been requested already" ;;
  esac
  wait_until_active
}

wait_until_active() {
  local now last=none begin=$SECONDS printed=0 unknown=0
  while :; do
    now=$(state)
    if [[ $now != "$last" ]] || ((SECONDS - printed >= 300)); then
      printf '%6d s  %s\n' $((SECONDS - begin)) "${now:-unknown}"
      printed=$SECONDS
    fi
    case $now in
      '')
        if ((++unknown == 5)); then
          echo "gcloud does not report the state of $name:" >&2
          queue describe >&2
          exit 1
        fi
        ;;
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING)
        echo "$name is $now and will not become ACTIVE: see ${0##*/} status, then create it again" >&2
        exit 1
        ;;
    esac
    [[ -z $now ]] || unknown=0
    last=$now
    sleep "$poll"
  done
}

setup() {
  local hash archive
  local unpack='mkdir -p evit_jax && cd evit_jax && rm -rf configs evit_jax launch && tar -xzf ../evit_jax.tar.gz && cd ..'
  hash=$(git -C "$root" rev-parse --verify --quiet "$commit^{commit}") ||
    refuse "--commit=$commit is no commit of $root"
  git -C "$root" diff --quiet HEAD -- || echo "note: uncommitted changes are not copied" >&2
  archive=${TMPDIR:-/tmp}/evit_jax-$hash.tar.gz
  run git -C "$root" archive --format=tar.gz "--output=$archive" "$hash"
  run gcloud compute tpus tpu-vm scp "$archive" "$name:evit_jax.tar.gz" "${location[@]}" --worker=all
  run gcloud compute tpus tpu-vm ssh "$name" "${location[@]}" --worker=all \
    "--command=$unpack && bash evit_jax/launch/tpu_worker.sh install"
  run rm -f "$archive"
}

start() {
  read_run
  config_in_repository
  check_form workdir '^(gs:/)?/.' 'gs://BUCKET/... or an absolute path that all workers share'
  on_workers all start "${flags[@]}"
}

case $command in
  create | setup | start) "$command" ;;
  stop) on_workers all stop ;;
  logs)
    check_form worker '^(all|[0-9]+)$' 'a number or all'
    on_workers "$worker" logs
    ;;
  status)
    queue describe '--format=yaml(state)'
    [[ -z $dry_run && $(state) != ACTIVE ]] || on_workers all status
    ;;
  delete)
    confirm "Delete $name in $zone, with its disks"
    queue delete --force --quiet
    ;;
esac
