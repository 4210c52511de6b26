# Sourced by the launch scripts: reads and checks their arguments, and runs or prints commands.
# shellcheck shell=bash

# shellcheck disable=SC2034  # the scripts that source this file use its variables
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PREEMPTED=75  # exit code of evit_jax.main after it saved on a signal; the same command continues (EX_TEMPFAIL)

# refuse MESSAGE: ends the script before it has done anything. The message names the value, its limit and a way out.
refuse() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

# need_bash MAJOR MINOR: requires this version of bash.
need_bash() {
  ((BASH_VERSINFO[0] > $1 || (BASH_VERSINFO[0] == $1 && BASH_VERSINFO[1] >= $2))) ||
    refuse "this bash is $BASH_VERSION, but $1.$2 is needed: install a newer one and put it first on the PATH"
}

# print_help: prints the comment at the top of the script.
print_help() {
  awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$0"
}

# read_options 'name: env+ spot' ARGUMENT...: sets a variable for each option. `name:` takes a value, `env+` appends a
# value to an array, `spot` is set to yes. All scripts have --help and --dry-run. Words without dashes are stored in
# `words`, arguments after -- in `passed`.
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
  ((${#words[@]} == 1)) || refuse "give one of: $* (got ${words[*]:-nothing}; see --help)"
  command=${words[0]}
  [[ " $* " == *" $command "* ]] || refuse "$command is not one of: $*"
}

# no_words: refuses words, in a script without commands.
no_words() {
  ((${#words[@]} == 0)) ||
    refuse "unexpected argument ${words[0]}: options begin with --; flags of evit_jax.main follow after --"
}

# require OPTION...: refuses an option without a value.
require() {
  local option
  for option; do
    [[ ${!option} ]] || refuse "--${option//_/-} is missing: see --help"
  done
}

# check_number OPTION MIN MAX: refuses a value outside the range.
check_number() {
  [[ ${!1} =~ ^(0|[1-9][0-9]{0,8})$ ]] || refuse "--${1//_/-}=${!1} is not a whole number from $2 to $3"
  ((${!1} >= $2 && ${!1} <= $3)) || refuse "--${1//_/-}=${!1} is not a whole number from $2 to $3"
}

# check_form OPTION PATTERN DESCRIPTION: refuses a value that does not match the pattern.
check_form() {
  [[ ${!1} =~ $2 ]] || refuse "--${1//_/-}=${!1} is not $3"
}

# read_run: checks `config` and `workdir`, and sets `flags` to the flags of evit_jax.main. The name of a recipe, such as
# digits, is replaced by its file, unless there is a file of this name.
# shellcheck disable=SC2154
read_run() {
  require config workdir
  if [[ $config != /* && ! -f $root/$config && -f $root/configs/$config.py ]]; then
    config=configs/$config.py
  fi
  (cd "$root" && [[ -f $config ]]) ||
    refuse "--config=$config: there is no such file in $root and no such recipe: give digits or configs/digits.py"
  flags=("--config=$config" "--workdir=$workdir" ${passed[@]+"${passed[@]}"})
}

# config_in_repository: refuses a config outside the repository, because only the repository is copied.
config_in_repository() {
  check_form config '^[^/]' 'a file of the repository, as configs/deit_s.py'
}

# need_tool PROGRAM ADVICE: refuses to run without a program on the PATH.
need_tool() {
  [[ $dry_run ]] || command -v "$1" >/dev/null || refuse "$1 is not on the PATH: $2"
}

# quoted WORD...: prints the words with quotes where a shell needs them.
quoted() {
  local word quote=\' escaped="'\\''" separator=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="'${word//$quote/"$escaped"}'"
    printf '%s%s' "$separator" "$word"
    separator=' '
  done
}

# run COMMAND...: runs the command, or prints it in a dry run.
run() {
  if [[ $dry_run ]]; then
    quoted "$@"
    echo
  else
    "$@"
  fi
}

# run_with_input TEXT COMMAND...: runs or prints the command, with the text as its standard input.
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

# confirm QUESTION: continues after the answer yes, or with --yes.
confirm() {
  local answer
  [[ -z $yes && -z $dry_run ]] || return 0
  [[ -t 0 ]] || refuse "$1? There is no terminal to ask in: give --yes"
  read -r -p "$1? [y/N] " answer
  [[ $answer == [yY]* ]] || { echo 'Nothing was done.' >&2 && exit 1; }
}
