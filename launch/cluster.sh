# Shared by tpu_pod, gke and slurm, which source it: options, quoting, and a plan that is printed or run.
#
# A plan is a list of command lines. `--dry-run` prints it, and what it prints is a script that does the same; otherwise
# each line is run. Works with the bash 3.2 of macOS.
#
# shellcheck shell=bash
# shellcheck source-path=SCRIPTDIR source=environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

main_arguments=() # what stands after --
dry_run=false
lines=()
reasons=()

die() {
  say "error: $*"
  exit 1
}

# quote WORD ... -> one line that any shell reads as these words.
quote() {
  local word line="" mark="'\\''"
  for word; do
    case $word in
      "" | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//\'/$mark}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# parse_options VALUES LISTS SWITCHES ARGUMENT ...: sets a variable for each option it finds: `--num-slices=2`, or
# `--num-slices 2`, sets num_slices. LISTS are options that may come several times, into an array; SWITCHES are set to
# true. The names are separated by spaces. The calling script has a function usage.
parse_options() {
  # Underscores: a variable of this function would hide the option of its name.
  local _values=" $1 " _lists=" $2 " _switches=" dry-run $3 " _name _variable _value
  shift 3
  while (($#)); do
    case $1 in
      -h | --help)
        usage
        exit
        ;;
      --)
        shift
        main_arguments=("$@")
        return
        ;;
      --*) ;;
      *) die "unexpected argument $(quote "$1"): options first, then --, then the arguments of coca_jax.main" ;;
    esac
    _name=${1%%=*}
    _name=${_name#--}
    _variable=${_name//-/_}
    if [[ $_switches == *" $_name "* ]]; then
      if [[ $1 == *=* ]]; then die "--$_name takes no value, not $(quote "${1#*=}")"; fi
      printf -v "$_variable" true
      shift
      continue
    elif [[ "$_values$_lists" != *" $_name "* ]]; then
      die "unknown option --$_name: --help lists the options; those of coca_jax.main come after --"
    elif [[ $1 == *=* ]]; then
      _value=${1#*=}
    elif (($# > 1)) && [[ $2 != -- ]]; then
      _value=$2
      shift
    else
      die "--$_name needs a value: --$_name=VALUE"
    fi
    shift
    if [[ $_values == *" $_name "* ]]; then
      printf -v "$_variable" '%s' "$_value"
    else
      eval "$_variable+=(\"\$_value\")" # the name is one of LISTS
    fi
  done
}

# require OPTION ...: the options that must have been given.
require() {
  local _name _variable
  for _name; do
    _variable=${_name//-/_}
    if [[ -z ${!_variable} ]]; then die "--$_name is missing: --$_name=VALUE, see --help"; fi
  done
}

# is_count OPTION: its value must be a whole number above zero.
is_count() {
  local _variable=${1//-/_}
  if ! [[ ${!_variable} =~ ^[1-9][0-9]*$ ]]; then
    die "--$1=$(quote "${!_variable}") is not a number of 1 or more: --$1=2, say"
  fi
}

# check_environment NAME=VALUE ...: what --env was given.
check_environment() {
  local setting
  for setting; do
    if ! [[ $setting =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; then die "--env=$(quote "$setting"): write --env=NAME=VALUE"; fi
  done
}

# main_value NAME -> the value of --NAME among the arguments of coca_jax.main; nothing where it is not there.
main_value() {
  local i
  for ((i = 0; i < ${#main_arguments[@]}; i++)); do
    case ${main_arguments[i]} in
      "--$1="* | "-$1="*) printf '%s' "${main_arguments[i]#*=}" ;;
      "--$1" | "-$1") printf '%s' "${main_arguments[i + 1]-}" ;;
    esac
  done
}

# check_main WHY: coca_jax.main must be given a recipe and a workdir. Where WHY is not empty the workdir must be in a
# bucket, and WHY says why.
check_main() {
  local config workdir
  config=$(main_value config)
  workdir=$(main_value workdir)
  if [[ -z $config ]]; then die "no recipe: end with -- --config=configs/NAME.py --workdir=FOLDER"; fi
  if [[ -z $workdir ]]; then die "no workdir: end with -- --config=$(quote "$config") --workdir=FOLDER"; fi
  if [[ -n $1 && $workdir != *://* ]]; then
    die "--workdir=$(quote "$workdir") is no bucket, and $1: write --workdir=gs://BUCKET/FOLDER"
  fi
  if [[ $config != /* && ! -f $repository/${config%%:*} ]]; then
    die "--config=$(quote "$config"): no such file in $repository; a recipe is a file such as configs/coca_giant.py"
  fi
}

# check_copied: the recipe must be among what is copied to the machines, under the name that it has there.
check_copied() {
  local config
  config=$(main_value config)
  config=${config%%:*}
  if [[ $config == "$repository"/* ]]; then
    die "--config=$(quote "$config") is here alone: write it as it is called in this working tree, --config=$(quote "${config#"$repository"/}")"
  elif [[ $config == ../* || $config == */../* ]]; then
    die "--config=$(quote "$config") is outside of this working tree, which is all that is copied: move it, to configs/ for instance"
  elif git -C "$repository" check-ignore --quiet "$config" 2>/dev/null; then
    die "--config=$(quote "$config"): git ignores it, and what git ignores is not copied: move it, to configs/ for instance"
  fi
}

# need PROGRAM HINT: the program must be there, unless nothing is going to be run.
need() {
  if ! $dry_run && ! command -v "$1" >/dev/null; then
    die "$1 is not on the PATH: $2 (--dry-run shows what would be run)"
  fi
}

# step REASON WORD ...: adds a command to the plan.
step() {
  reasons+=("$1")
  shift
  lines+=("$(quote "$@")")
}

# script_step REASON LINE: adds a line of shell, quoted already.
script_step() {
  reasons+=("$1")
  lines+=("$2")
}

# carry_out: prints the plan, or does it. Ends at the first command that fails.
carry_out() {
  local i
  if $dry_run; then printf '#!/usr/bin/env bash\nset -euo pipefail\n'; fi
  for ((i = 0; i < ${#lines[@]}; i++)); do
    if $dry_run; then
      printf '\n# %s\n%s\n' "${reasons[i]}" "${lines[i]}"
    else
      say "== ${reasons[i]}"
      # A shell of its own: what the lines do is what a person would do who types them.
      bash -c "set -euo pipefail; ${lines[i]}" ||
        die "this failed with status $?: ${reasons[i]}. Mend what is said above and start again: it takes up where it was"
    fi
  done
}

# hint NAME WORD ...: a command for later, e.g. to look at the log.
hint() {
  local name=$1
  shift
  printf '# %-8s %s\n' "$name:" "$(quote "$@")"
}
