# Sourced by the launch scripts: reads and checks their arguments; prints commands, runs them, or both.
# shellcheck shell=bash

# shellcheck disable=SC2034  # the variables of this file are for those who source it
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PREEMPTED=75  # the exit code of evit_jax.main when it has saved on a signal, to go on later (EX_TEMPFAIL)

# Ends the script before anything was done: the value, the limit, the way out.
refuse() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# need_bash MAJOR MINOR
need_bash() {
  ((BASH_VERSINFO[0] > $1 || (BASH_VERSINFO[0] == $1 && BASH_VERSINFO[1] >= $2))) ||
    refuse "this bash is $BASH_VERSION, but $1.$2 is needed: install a newer one and put it first on the PATH"
}

# The comment at the top of a script is its help.
print_help() {
  awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0"
}

# read_options 'name: env+ spot' ARGUMENT...: sets one variable per option: its value (name:), one more element (env+),
# or yes. Every script knows --help and --dry-run. Words without dashes go to `words`, what follows -- to `passed`.
read_options() {
  local known=" dry-run ${1//$'\n' /} " argument option options
  shift
  words=() passed=() dry_run=''
  while (($#)); do
    argument=$1
    shift
    case $argument in
      --) passed=("$@") && return ;;
      -h | --help) print_help && exit ;;
      --*) option=${argument%%=*} && option=${option#--} ;;
      *) words+=("$argument") && continue ;;
    esac
    if [[ $known == *" $option "* ]]; then
      [[ $argument != *=* ]] || refuse "--$option takes no value: leave out =${argument#*=}"
      printf -v "${option//-/_}" yes
    elif [[ $known == *" $option"[:+]" "* ]]; then
      if [[ $argument != *=* ]]; then
        [[ ${1---} != --* ]] || refuse "--$option needs a value: write --$option=VALUE"
        argument+="=$1"
        shift
      fi
      _set_option "$option" "${argument#*=}" "$known"
    else
      options=${known//[:+]/}
      options=${options% }
      refuse "--$option is not one of${options// / --}; flags of evit_jax.main follow after --"
    fi
  done
}

_set_option() {
  if [[ $3 == *" $1+ "* ]]; then
    local -n _list=${1//-/_}
    _list+=("$2")
  else
    printf -v "${1//-/_}" %s "$2"
  fi
}

# choose_command NAME...: sets `command` to the one word that was given.
choose_command() {
  ((${#words[@]} == 1)) || refuse "say one of: $* (got ${words[*]:-nothing}; see --help)"
  command=${words[0]}
  [[ " $* " == *" $command "* ]] || refuse "$command is not one of: $*"
}

# no_words: for a script without commands.
no_words() {
  ((${#words[@]} == 0)) || refuse "what is ${words[0]} for? Options begin with --; flags of evit_jax.main follow after --"
}

# require OPTION...
require() {
  local option
  for option; do
    [[ ${!option} ]] || refuse "--${option//_/-} is missing: see --help"
  done
}

# check_number OPTION LEAST MOST
check_number() {
  [[ ${!1} =~ ^(0|[1-9][0-9]{0,8})$ ]] || refuse "--${1//_/-}=${!1} is not a whole number from $2 to $3"
  ((${!1} >= $2 && ${!1} <= $3)) || refuse "--${1//_/-}=${!1} is not a whole number from $2 to $3"
}

# check_form OPTION PATTERN DESCRIPTION
check_form() {
  [[ ${!1} =~ $2 ]] || refuse "--${1//_/-}=${!1} is not $3"
}

# What every launch says of the run. Uses `config` and `workdir`, sets `flags`, those of evit_jax.main.
# shellcheck disable=SC2154
read_run() {
  require config workdir
  (cd "$root" && [[ -f $config ]]) || refuse "--config=$config: there is no such file in $root, as configs/digits.py"
  flags=("--config=$config" "--workdir=$workdir" ${passed[@]+"${passed[@]}"})
}

# For a launch that takes along the repository, and nothing else of this machine.
config_in_repository() {
  check_form config '^[^/]' 'a file of the repository, as configs/deit_s.py'
}

# need_tool PROGRAM SOURCE
need_tool() {
  [[ $dry_run ]] || command -v "$1" >/dev/null || refuse "$1 is not on the PATH: $2"
}

# The words as a shell reads them, quoted where they must be.
quoted() {
  local word quote=\' escaped="'\\''" separator=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//$quote/"$escaped"}'"
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

# Runs the command, or prints it in a dry run.
run() {
  if [[ $dry_run ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# run_with_input TEXT COMMAND...: the same, with the text on its standard input.
run_with_input() {
  local text=$1
  shift
  if [[ $dry_run ]]; then
    quoted "$@"
    printf " <<'END'\n%s\nEND\n" "$text"
  else
    "$@" <<<"$text"
  fi
}

# confirm QUESTION: goes on after a yes, or with --yes.
confirm() {
  local answer
  [[ -z $yes && -z $dry_run ]] || return 0
  [[ -t 0 ]] || refuse "$1? Nobody can be asked here: give --yes"
  read -r -p "$1? [y/N] " answer
  [[ $answer == [yY]* ]] || { echo 'Nothing was done.' >&2 && exit 1; }
}
