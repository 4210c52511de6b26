#!/usr/bin/env bash
# Trains on a Slurm cluster: one process per GPU. The job is requeued when preempted or out of time.
#
# Usage: launch/slurm.sh COMMAND [options] [-- FLAGS of evit_jax.main]
#
#   submit   submits the job
#   logs     follows the log of the job
#   cancel   cancels all your jobs of this name
#
#   --name NAME            name of the job (evit)
#   --nodes N              number of nodes (1)
#   --gpus-per-node N      number of GPUs to use in each node; 0: no GPUs, one process per node (8)
#   --cpus-per-process N   cores of each process, for its data workers (8)
#   --time TIME            time limit of the job, such as 24:00:00 or 2-00:00:00; the run then continues in a requeued
#                          job (24:00:00)
#   --partition PARTITION  partition to run in (the cluster's default)
#   --account ACCOUNT      account to charge (the cluster's default)
#   --sbatch OPTION        another option of sbatch, such as --sbatch=--constraint=a100; may be repeated
#   --grace SECONDS        time between SIGTERM and the time limit, for saving (120)
#   --restarts N           number of restarts after a process was killed or aborted; preemptions do not count (10)
#   --logs DIR             folder of the log NAME.log, on a disk that all nodes share (runs/slurm)
#   --python PROGRAM       the Python to use, with jax[cuda13] installed (.venv/bin/python)
#   --config NAME          a recipe (digits) or its file (configs/digits.py)
#   --workdir DIR          folder of the run, on a disk that all nodes share
#   --yes                  cancel: without confirmation
#   --dry-run              prints the commands and runs nothing
#
# This repository must be on a disk that all nodes share; paths are relative to it. NAME.crashes, next to the log, has a
# line for each start that ended because a process was killed or aborted.
#
# Examples:
#   launch/slurm.sh submit --nodes 2 --gpus-per-node 8 --config configs/deit_s.py --workdir runs/deit_s
#   launch/slurm.sh submit --gpus-per-node 4 --config configs/deit_s.py --workdir runs/deit_s -- --config.seed=1
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
need_bash 4 4

name=evit nodes=1 gpus_per_node=8 cpus_per_process=8 time=24:00:00 partition='' account='' sbatch=() grace=120
restarts=10 logs=runs/slurm python='' config='' workdir='' yes=''
read_options 'name: nodes: gpus-per-node: cpus-per-process: time: partition: account: sbatch+ grace: restarts: logs:
  python: config: workdir: yes' "$@"
choose_command submit logs cancel
cd "$root"
check_form name '^[A-Za-z0-9][-A-Za-z0-9._]*$' 'a name of letters, digits, dots, - and _'
# Slurm expands % and the character after it.
check_form logs '^[^%]+$' 'a folder without % in its name'
[[ $logs == /* ]] || logs=$root/$logs

check_job() {
  read_run
  check_number nodes 1 4096
  check_number gpus_per_node 0 64
  check_number cpus_per_process 1 1024
  check_number grace 0 65535
  check_number restarts 0 1000000
  check_form time '^([0-9]+-)?[0-9]+(:[0-5][0-9]){0,2}$' 'a time, as 24:00:00 or 2-00:00:00'
  python=${python:-$root/.venv/bin/python}
  [[ -x $python || $dry_run ]] || refuse "--python=$python is not a program: make it with make venv, then add jax[cuda13]"
}

# batch_script: prints the script that Slurm runs on the first node. JAX finds the processes by Slurm's variables; the i-th
# process of a node takes the i-th GPU. Each process must therefore see all GPUs, which rules out --gpus-per-task.
batch_script() {
  cat <<END
#!/bin/bash
cd $(quoted "$root") || exit
# is_ending: succeeds if Slurm ends the job, because someone cancelled or requeued it or another job preempts it. Slurm
# has then signalled the tasks and decided about the restart; scancel would block, and scontrol would undo a cancellation.
is_ending() {
  [[ \$(squeue --noheader --format=%T --jobs="\$SLURM_JOB_ID") == COMPLETING ]]
}
# Before the time limit, Slurm sends SIGTERM to this script alone. A SIGTERM to srun would end the job.
stopping=''
trap 'is_ending || { stopping=yes && scancel --signal=TERM "\$SLURM_JOB_ID"; }' TERM
# When one process ends, the others end by themselves; --wait ends those that hang.
srun --cpus-per-task=$cpus_per_process$gpu_bind --kill-on-bad-exit=0 --wait=300 \\
  $(quoted "$python" -m evit_jax.main "${flags[@]}") &
step=\$!
code=0
wait "\$step" || code=\$?
while kill -0 "\$step" 2>/dev/null; do  # a signal ends \`wait\` while the step still runs
  code=0
  wait "\$step" || code=\$?
done
echo "srun ended with exit code \$code"
! is_ending || exit "\$code"
[[ -z \$stopping ]] || ((code != 128 + 15)) || code=$PREEMPTED  # SIGTERM before the program handles it
if ((code > 128)); then  # a process was killed or aborted, as by the failure of a node
  crashes=$(quoted "$logs/$name.crashes")
  echo "job \$SLURM_JOB_ID ended with exit code \$code after \$SECONDS s" >>"\$crashes" || exit "\$code"
  ((\$(grep -c "^job \$SLURM_JOB_ID " "\$crashes") > $restarts)) || code=$PREEMPTED
fi
if ((code == $PREEMPTED)); then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
END
}

submit() {
  local gpu_bind='' gpu_request='' processes=1
  check_job
  if ((gpus_per_node)); then
    processes=$gpus_per_node gpu_request=--gpus-per-node=$gpus_per_node gpu_bind=' --gpu-bind=none'
  fi
  run mkdir -p "$logs"
  # --open-mode=append keeps the log of earlier jobs of this run.
  run_with_input "$(batch_script)" sbatch "--job-name=$name" "--nodes=$nodes" "--ntasks-per-node=$processes" \
    ${gpu_request:+"$gpu_request"} "--cpus-per-task=$cpus_per_process" "--time=$time" \
    ${partition:+"--partition=$partition"} ${account:+"--account=$account"} --requeue "--signal=B:TERM@$grace" \
    --open-mode=append "--output=$logs/$name.log" ${sbatch[@]+"${sbatch[@]}"}
}

[[ $command == logs ]] || need_tool sbatch 'run this on a login node of the cluster'
case $command in
  submit) submit ;;
  logs) run tail -n 100 -F "$logs/$name.log" ;;
  cancel)
    confirm "Cancel your jobs of the name $name"
    run scancel --me "--name=$name"
    ;;
esac
