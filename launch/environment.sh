# The virtual environment that quickstart, test, .ci/run and the machines of a cluster share. Sourced by them (bash), not run.
#
#   source launch/environment.sh
#   make_environment emoji     # sets $python: the interpreter in which coca_jax[emoji] is installed
#
# Read from outside:
#   PYTHON           interpreter that makes the environment; without it the first one of 3.11 or newer that is found
#   COCA_JAX_VENV    folder of the environment; without it .venv in the repository
#   COCA_JAX_EXTRAS  further extras to install, separated by commas: gpu, tpu, gcs
#
# shellcheck shell=bash

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

say() {
  printf '%s\n' "$*" >&2
}

# duration SECONDS -> 1 min 05 s
duration() {
  if (($1 < 60)); then
    printf '%d s' "$1"
  else
    printf '%d min %02d s' "$(($1 / 60))" "$(($1 % 60))"
  fi
}

# python_version INTERPRETER -> 3.11, or nothing where it does not run. A pyenv shim is on the PATH for each version
# that was ever installed, and runs only for those that are switched on: so it is started, not just looked for.
python_version() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null || true
}

# is_supported VERSION: 3.11 or newer, as `requires-python` in pyproject.toml says.
is_supported() {
  local major=${1%%.*} minor=${1##*.}
  ((major == 3 && minor >= 11))
}

# Every interpreter that might do, one a line: what `python3` means to this person first, then the newest, then pyenv's.
python_candidates() {
  local name
  for name in python3 python python3.14 python3.13 python3.12 python3.11; do
    command -v "$name" || true
  done
  if command -v pyenv >/dev/null; then
    printf '%s\n' "$(pyenv root)"/versions/*/bin/python
  fi
}

# real_python INTERPRETER -> its own path: a shim means another one in another folder.
real_python() {
  "$1" -c 'import sys; print(sys.executable)'
}

# find_python -> path of the interpreter to use, or a plain error.
find_python() {
  local candidate version found=""
  if [[ -n ${PYTHON:-} ]]; then
    version=$(python_version "$PYTHON")
    if [[ -z $version ]]; then
      say "error: PYTHON=$PYTHON does not start as a Python: set PYTHON to the path of a Python 3.11 or newer"
      return 1
    elif ! is_supported "$version"; then
      say "error: PYTHON=$PYTHON is Python $version: coca_jax needs 3.11 or newer"
      return 1
    fi
    real_python "$PYTHON"
    return
  fi
  while read -r candidate; do
    version=$(python_version "$candidate")
    if [[ -n $version ]] && is_supported "$version"; then
      real_python "$candidate"
      return
    fi
    found+=${version:+ $version ($candidate)}
  done < <(python_candidates)
  say "error: coca_jax needs Python 3.11 or newer; found:${found:- no Python at all}. Install one, or set PYTHON to its path"
  return 1
}

# find_or_fetch_python HAVE_UV -> find_python, or one that uv fetches where there is none and none is asked for.
find_or_fetch_python() {
  if [[ -z ${PYTHON:-} ]] && $1 && ! find_python >/dev/null 2>&1; then
    say "No Python 3.11 or newer here: uv fetches 3.12"
    uv python install 3.12 >&2 && uv python find 3.12
  else
    find_python
  fi
}

# What an installation depends on: while this is unchanged, there is nothing to install. An editable installation
# points into this repository, so a clone that was moved is installed again.
installation_stamp() {
  printf '%s\n' "$repository" "$1" "$(python_version "$2")"
  cat "$repository/setup.py" "$repository/pyproject.toml"
}

# make_environment EXTRA: creates the environment, installs coca_jax[EXTRA] in it (or coca_jax where EXTRA is empty), and
# sets $python.
make_environment() {
  local extras=$1${COCA_JAX_EXTRAS:+,$COCA_JAX_EXTRAS}
  extras=${extras#,}
  local package=coca_jax${extras:+[$extras]}
  local venv=${COCA_JAX_VENV:-$repository/.venv}
  if [[ $venv != /* ]]; then venv=$PWD/$venv; fi
  local base version started=$SECONDS stamp
  local have_uv=false
  if uv --version >/dev/null 2>&1; then have_uv=true; fi
  # Where pip is told of further packages, uv is too.
  if [[ -n ${PIP_FIND_LINKS:-} && -z ${UV_FIND_LINKS:-} ]]; then export UV_FIND_LINKS=$PIP_FIND_LINKS; fi

  python=$venv/bin/python
  version=$(python_version "$python")
  if [[ -z $version ]]; then
    if [[ -e $venv ]]; then
      say "error: $venv exists but holds no Python that starts: remove it, or set COCA_JAX_VENV to another folder"
      return 1
    fi
    base=$(find_or_fetch_python "$have_uv") || return 1
    say "Creating $venv with Python $(python_version "$base") ($base)"
    if $have_uv; then
      uv venv --quiet --python "$base" "$venv" || return 1
    elif ! "$base" -m venv "$venv"; then
      rm -rf "$venv"
      say "error: $base has no working venv module: install it (Debian, Ubuntu: apt install python3-venv), or install uv"
      return 1
    fi
  elif ! is_supported "$version"; then
    say "error: $venv holds Python $version, coca_jax needs 3.11 or newer: remove it, or set COCA_JAX_VENV"
    return 1
  elif [[ -n ${PYTHON:-} ]]; then
    base=$(find_python) || return 1
    if [[ $(python_version "$base") != "$version" ]]; then
      say "error: $venv holds Python $version, but PYTHON=$PYTHON is $(python_version "$base"):" \
        "remove it, or set COCA_JAX_VENV to another folder"
      return 1
    fi
  fi

  stamp=$venv/.coca_jax-${extras//,/-}
  if [[ -f $stamp && $(<"$stamp") == "$(installation_stamp "$extras" "$python")" ]]; then
    return
  fi
  rm -f "$stamp"
  if $have_uv; then
    say "Installing $package with uv"
    # With pip, which uv leaves out: docs and messages say `pip install "coca_jax[...]"`, and another environment's pip
    # would not find it.
    uv pip install --python "$python" pip --editable "$repository${package#coca_jax}" || return 1
  else
    say "Installing $package with pip: some minutes the first time"
    "$python" -m pip --version >/dev/null 2>&1 || "$python" -m ensurepip --upgrade >/dev/null || return 1
    local options=(--disable-pip-version-check)
    if [[ ! -t 1 ]]; then options+=(--quiet); fi # a progress bar for a person, silence for a log
    "$python" -m pip install "${options[@]}" --editable "$repository${package#coca_jax}" || return 1
  fi
  installation_stamp "$extras" "$python" >"$stamp"
  say "Installed in $(duration $((SECONDS - started)))"
}
