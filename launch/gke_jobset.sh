#!/usr/bin/env bash
# Trains on TPUs of a GKE cluster, as a JobSet: one pod per TPU host. All pods restart together when one fails.
#
# Usage: launch/gke_jobset.sh COMMAND --name NAME [options] [-- FLAGS of evit_jax.main]
#
#   apply    starts the run
#   render   prints the manifest that apply uses
#   logs     follows the log of one pod, or of all
#   status   shows the JobSet and its pods
#   delete   deletes the JobSet and its pods; the workdir stays
#
#   --name NAME             name of the JobSet
#   --namespace NAMESPACE   namespace of the JobSet (kubectl's default)
#   --context CONTEXT       kubectl context of the cluster (kubectl's default)
#   --image IMAGE           image built from launch/Dockerfile, in a registry that the cluster can access
#   --type TYPE             v4, v5e, v5p or v6e
#   --topology TOPOLOGY     topology of the slice, such as 2x4 or 4x4 (v5e, v6e), 2x2x4 (v4, v5p)
#   --chips-per-host N      8 or 4, if both are possible, such as in 2x4 (8)
#   --spot                  uses spot nodes
#   --restarts N            number of restarts after failures; preemptions do not count (10)
#   --grace SECONDS         time from SIGTERM to SIGKILL (120; spot nodes may allow only 15)
#   --env KEY=VALUE         environment variable; may be repeated
#   --service-account NAME  Kubernetes service account that may use the bucket
#   --config NAME           a recipe (digits) or its file (configs/digits.py)
#   --workdir DIR           folder of the run, gs://BUCKET/...
#   --worker N              logs: index of the pod, or all (0)
#   --yes                   delete: without confirmation
#   --dry-run               prints the commands and runs nothing
#
# The cluster needs the JobSet controller and a node pool of this type and topology.
#
# Examples:
#   docker build -f launch/Dockerfile -t IMAGE . && docker push IMAGE
#   launch/gke_jobset.sh apply --name evit --image IMAGE --type v5e --topology 4x4 --spot \
#     --config configs/deit_s.py --workdir gs://BUCKET/evit -- --config.seed=1
#   launch/gke_jobset.sh logs --name evit
set -euo pipefail
# shellcheck source=launch/arguments.sh
source "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
# shellcheck source=launch/tpu_shapes.sh
source "$root/launch/tpu_shapes.sh"
need_bash 4 4

# shellcheck disable=SC2034  # the template uses `spot`
name='' namespace='' context='' image='' type='' topology='' chips_per_host='' spot='' restarts=10 grace=120
service_account='' config='' workdir='' worker=0 yes='' env=()
read_options 'name: namespace: context: image: type: topology: chips-per-host: spot restarts: grace: env+
  service-account: config: workdir: worker: yes' "$@"
choose_command apply render logs status delete
require name
# Pod names, NAME-slice-0-INDEX-xxxxx, have at most 63 characters.
check_form name '^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$' 'a name of lower case letters, digits and -, at most 40'
cluster=(kubectl ${context:+"--context=$context"} ${namespace:+"--namespace=$namespace"})
pods="jobset.sigs.k8s.io/jobset-name=$name"

# yaml_string TEXT: prints a YAML string in the form of JSON. $( is doubled, because Kubernetes expands $(NAME).
yaml_string() {
  local text=$1
  [[ $text != *[[:cntrl:]]* ]] || refuse "${text@Q} has a line break or another control character: leave it out"
  text=${text//\$(/\$\$(}
  text=${text//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

yaml_flags() {
  local word separator=''
  printf '['
  for word; do
    printf %s "$separator"
    yaml_string "$word"
    separator=', '
  done
  printf ']'
}

yaml_env() {
  local pair separator=''
  printf '['
  for pair; do
    [[ $pair =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || refuse "--env=$pair is not KEY=VALUE"
    printf '%s{name: "%s", value: ' "$separator" "${pair%%=*}"
    yaml_string "${pair#*=}"
    printf '}'
    separator=', '
  done
  printf ']'
}

read_job() {
  read_run
  config_in_repository
  require image type topology
  check_form image '^[^[:space:]]+$' 'the name of an image'
  check_form workdir '^gs://.' 'gs://BUCKET/...: the disk of a pod ends with it'
  check_number restarts 0 1000000
  check_number grace 0 86400
  [[ -z $service_account ]] || check_form service_account '^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$' 'the name of a service account'
  shape_of_topology "$type" "$topology" "$chips_per_host"
  case $type in
    v4) accelerator=tpu-v4-podslice ;;
    v5e) accelerator=tpu-v5-lite-podslice ;;
    v5p) accelerator=tpu-v5p-slice ;;
    v6e) accelerator=tpu-v6e-slice ;;
  esac
  image_string=$(yaml_string "$image")
  flag_list=$(yaml_flags "${flags[@]}")
  env_list=$(yaml_env ${env[@]+"${env[@]}"})
}

# render: prints the template with its values. Lines marked `# with --OPTION` are kept if that option was given.
render() {
  local line option optional='^(.*)  # with --(.+)$' placeholder='^(.*)\$\{([a-z_]+)\}(.*)$'
  local -A values=([name]=$name [restarts]=$restarts [hosts]=$hosts [grace]=$grace [accelerator]=$accelerator
    [topology]=$topology [image]=$image_string [flags]=$flag_list [env]=$env_list
    [service_account]=$service_account [chips_per_host]=$chips_per_host)
  while IFS= read -r line; do
    if [[ $line =~ $optional ]]; then
      line=${BASH_REMATCH[1]} option=${BASH_REMATCH[2]//-/_}
      [[ ${!option} ]] || continue
    fi
    if [[ $line =~ $placeholder ]]; then
      line=${BASH_REMATCH[1]}${values[${BASH_REMATCH[2]}]}${BASH_REMATCH[3]}
    fi
    printf '%s\n' "$line"
  done <"$root/launch/jobset.yaml"
}

case $command in
  apply | render) read_job ;;
  logs) check_form worker '^(all|[0-9]+)$' 'a number or all' ;;
  delete) confirm "Delete the JobSet $name" ;;
esac
[[ $command != render ]] || { render && exit; }
need_tool kubectl 'install it, for example with gcloud components install kubectl'
case $command in
  apply) run_with_input "$(render)" "${cluster[@]}" apply -f - ;;
  logs)
    [[ $worker == all ]] || pods+=",batch.kubernetes.io/job-completion-index=$worker"
    run "${cluster[@]}" logs --follow --prefix --tail=100 --max-log-requests=2048 "--selector=$pods"
    ;;
  status)
    run "${cluster[@]}" get jobset "$name"
    run "${cluster[@]}" get pods --output=wide "--selector=$pods"
    ;;
  delete) run "${cluster[@]}" delete jobset "$name" ;;
esac
