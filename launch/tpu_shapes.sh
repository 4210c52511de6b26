# Sourced by the launch scripts for TPUs: the slices that exist, with their numbers of chips and hosts.
# Sources: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e; cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
# shellcheck shell=bash
# shellcheck disable=SC2034  # the scripts that source this file use its variables

_FLAT='1x1 2x2 2x4 4x4 4x8 8x8 8x16 16x16'  # v5e and v6e
_SMALL='2x2x1 2x2x2 2x2x4 2x4x4'            # v4 and v5p below one cube of 4x4x4

# shape_of_topology GENERATION TOPOLOGY [CHIPS_PER_HOST]: sets `chips`, `chips_per_host` and `hosts`.
shape_of_topology() {
  local most possible
  case $1 in
    v5e | v6e)
      [[ " $_FLAT " == *" $2 "* ]] || refuse "--topology=$2: $1 has $_FLAT" ;;
    v4) most=4096 ;;
    v5p) most=6144 ;;
    *) refuse "--type=$1 is not one of v4, v5e, v5p, v6e" ;;
  esac
  [[ -z ${most-} || " $_SMALL " == *" $2 "* ]] || _check_cubes "$1" "$2" "$most"
  chips=$((${2//x/*}))
  possible=4
  case $chips in
    1) possible=1 ;;
    8) [[ $1 == v4 || $1 == v5p ]] || possible='8 4' ;;
  esac
  chips_per_host=${3:-${possible%% *}}
  [[ " $possible " == *" $chips_per_host "* ]] ||
    refuse "--chips-per-host=$chips_per_host: $1 in $2 has hosts of ${possible/ / or } chips"
  hosts=$((chips / chips_per_host))
}

_check_cubes() {
  local fits="sides that are multiples of 4, none smaller than the one before it, and at most $3 chips"
  [[ $2 =~ ^([1-9][0-9]?)x([1-9][0-9]?)x([1-9][0-9]?)$ ]] || refuse "--topology=$2: $1 has $_SMALL, or AxBxC of $fits"
  local a=${BASH_REMATCH[1]} b=${BASH_REMATCH[2]} c=${BASH_REMATCH[3]}
  ((a % 4 == 0 && b % 4 == 0 && c % 4 == 0 && a <= b && b <= c && a * b * c <= $3)) ||
    refuse "--topology=$2: $1 has $_SMALL, or AxBxC of $fits"
}

# check_accelerator TYPE: checks a type such as v5litepod-16, and sets `default_runtime`.
check_accelerator() {
  local size=${1##*-} flat='1 4 8 16 32 64 128 256'
  case $1 in
    v5litepod-* | v6e-*)
      [[ " $flat " == *" $size "* ]] || refuse "--type=$1: ${1%-*} has ${flat// /, } chips" ;;
    v4-* | v5p-*)
      [[ $size =~ ^[1-9][0-9]{0,4}$ ]] || size=0
      ((size && size % 8 == 0 && size <= 12288)) ||
        refuse "--type=$1: the number is of cores, two a chip: a multiple of 8, at most 12288" ;;
    *) refuse "--type=$1 is not one of v4-N, v5litepod-N, v5p-N, v6e-N, as v5litepod-8" ;;
  esac
  case $1 in
    v4-*) default_runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) default_runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) default_runtime=v2-alpha-tpuv5 ;;
    v6e-*) default_runtime=v2-alpha-tpuv6e ;;
  esac
}
