# shellcheck shell=bash
# Sourced by the scripts beside it: finds a Python, makes a virtual environment, installs into it once.
# It sets $python to the environment's interpreter.

# shellcheck source=launch/commands.sh
. "$(dirname "${BASH_SOURCE[0]}")/commands.sh"

# python_runs PYTHON: it starts (a pyenv shim may be there and still fail) and is new enough.
python_runs() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' </dev/null >/dev/null 2>&1
}

# find_python: prints the path of the Python to make an environment with, $PYTHON where that is set.
find_python() {
  local candidate
  if [ -n "${PYTHON:-}" ]; then
    python_runs "$PYTHON" ||
      stop "PYTHON is '$PYTHON', which is not a Python 3.11 or newer that runs; give the path of one, e.g. PYTHON=/usr/bin/python3.12"
    set -- "$PYTHON"
  else
    set -- python3.13 python3.12 python3.11 python3 python
  fi
  for candidate in "$@"; do
    if python_runs "$candidate"; then
      "$candidate" -c 'import sys; print(sys.executable)' </dev/null
      return
    fi
  done
  stop "found no Python 3.11 or newer on PATH; install one (python.org, your package manager, or 'uv python install 3.13') and, if it is not on PATH, give it as PYTHON=/path/to/python"
}

python_version() { "$1" -c 'import sys; print(sys.version.split()[0])' </dev/null; }

# create_environment FOLDER BASE_PYTHON
create_environment() {
  if [ -e "$1" ] && [ ! -e "$1/pyvenv.cfg" ] && [ -n "$(ls -A "$1")" ]; then
    stop "'$1' is there and is not a virtual environment; move it away, or name another folder, e.g. JAXRM_VENV=.venv-jaxrm"
  fi
  [ "$dry_run" = 1 ] || say "Making a virtual environment in ${1##*/} with Python $(python_version "$2")."
  if "$2" -c 'import ensurepip, venv' </dev/null >/dev/null 2>&1; then
    run "$2" -m venv --clear "$1" </dev/null
  elif command -v uv >/dev/null; then
    run uv venv --quiet --clear --seed --python "$2" "$1" </dev/null
  else
    stop "the Python at '$2' cannot make virtual environments; install its venv package, e.g. apt install python3-venv"
  fi
}

# environment_folder ROOT: $JAXRM_VENV, meant from the repository where it is relative, else .venv there.
environment_folder() {
  case ${JAXRM_VENV:-.venv} in
    /*) printf '%s\n' "$JAXRM_VENV" ;;
    *) printf '%s\n' "$1/${JAXRM_VENV:-.venv}" ;;
  esac
}

# make_environment FOLDER: keeps the one that is there if it runs and is of $PYTHON's version, else makes it anew.
make_environment() {
  local base=''
  python="$1/bin/python"
  if [ -n "${PYTHON:-}" ]; then
    base=$(find_python) || exit 2
    if [ -x "$python" ] && [ "$(python_version "$python" 2>/dev/null)" != "$(python_version "$base")" ]; then
      create_environment "$1" "$base"
    fi
  fi
  if ! python_runs "$python"; then
    [ -n "$base" ] || base=$(find_python) || exit 2
    create_environment "$1" "$base"
  fi
}

# with_seconds COMMAND...: runs it, counting the seconds on a terminal, since installers say little for minutes.
with_seconds() {
  local ticker='' status=0
  if [ "$dry_run" = 1 ]; then
    quote_words "$@"
    return
  fi
  if [ -t 2 ]; then
    local start=$SECONDS
    # Ends by itself when this script is gone: a background job of a script does not hear Ctrl-C.
    (while kill -0 "$$" 2>/dev/null && sleep 1; do printf '\r  %d s ' "$((SECONDS - start))" >&2; done) &
    ticker=$!
  fi
  "$@" </dev/null || status=$?
  if [ -n "$ticker" ]; then
    kill "$ticker" 2>/dev/null || true
    wait "$ticker" 2>/dev/null || true
    printf '\r' >&2
  fi
  return "$status"
}

# An environment that uv made has no pip of its own.
ensure_pip() {
  [ "$dry_run" = 1 ] || "$python" -m pip --version </dev/null >/dev/null 2>&1 ||
    "$python" -m ensurepip </dev/null >/dev/null
}

pip_install() {
  ensure_pip
  with_seconds "$python" -m pip install -qq --disable-pip-version-check --no-input --prefer-binary "$@"
}

# Takes uv for its speed where there is one; where it finds less than pip (it does not read pip's settings), pip.
uv_or_pip_install() {
  ensure_pip
  if command -v uv >/dev/null; then
    with_seconds uv pip install --quiet --python "$python" "$@" && return
    say "uv did not manage; trying pip."
  fi
  pip_install "$@"
}

# install_once NAME WHAT FILE... -- COMMAND...: runs COMMAND unless it has succeeded here with the same FILEs and
# Python before. The stamp beside the environment's pyvenv.cfg is written last, so what was interrupted is redone.
install_once() {
  local name=$1 what=$2 files=() stamp key=''
  shift 2
  while [ "$1" != "--" ]; do
    files+=("$1")
    shift
  done
  shift
  stamp="${python%/bin/python}/.jaxrm-$name"
  if [ "$dry_run" = 0 ] || python_runs "$python"; then # in a dry run the environment may not be there
    key=$("$python" -c '
import hashlib, pathlib, sys
digest = hashlib.sha256(sys.version.encode())
for name in sys.argv[1:]:
    digest.update(hashlib.sha256(pathlib.Path(name).read_bytes()).digest())
print(digest.hexdigest())' "${files[@]}" </dev/null)
  fi
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then
    return
  fi
  if [ "$dry_run" = 1 ]; then
    "$@"
    return
  fi
  say "Installing $what (once; a few minutes)."
  "$@" || {
    say "jaxrm: the installation failed; the lines above say why. Nothing is lost: run the same command again."
    exit 1
  }
  printf '%s\n' "$key" >"$stamp.part"
  mv "$stamp.part" "$stamp"
}

# install_jaxrm ACCELERATOR: what requirements.txt names and, for gpu and tpu, the jaxlib of that extra of
# pyproject.toml. Meant from the repository's root.
install_jaxrm() {
  if [ "$1" = cpu ]; then
    install_once run "jaxrm's requirements" requirements.txt pyproject.toml -- uv_or_pip_install -r requirements.txt
  else
    install_once "$1" "jaxrm's requirements and JAX for $1" requirements.txt pyproject.toml -- \
      uv_or_pip_install --editable ".[$1]"
  fi
}

# find_accelerator ROOT: prints gpu, tpu or cpu, by the devices below ROOT: / but in tests.
find_accelerator() {
  if nvidia-smi --list-gpus >/dev/null 2>&1; then # there, and its driver answers
    echo gpu
  # A PCI device of Google's that is one of the TPUs that JAX knows (its network card, 0042, is none).
  elif grep -qsE '^PCI_ID=1AE0:(0027|0056|005E|0062|0063|006F|0076)$' "${1%/}"/sys/bus/pci/devices/*/uevent; then
    echo tpu
  else
    echo cpu
  fi
}
