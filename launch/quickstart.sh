#!/usr/bin/env bash
# From a fresh clone to two policies trained with PPO: ./launch/quickstart.sh
#
# Makes a virtual environment in .venv, installs what requirements.txt names (only when that has changed), and
# runs the whole method on the embedded task (configs/quickstart.py). Needs Python 3.11 or newer, about 2 GB of disk
# and, once, a package index; no accelerator, compiler or account.
#
#   ./launch/quickstart.sh --config.stages=sft        arguments go to python -m jaxrm.train
#   PYTHON=python3.12 ./launch/quickstart.sh          the Python to use, else the newest on PATH
#   JAXRM_VENV=/somewhere/else                        another folder for the environment
#
# It can be started from any folder; relative paths in the arguments start at the repository.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
# shellcheck source=launch/environment.sh
. "$root/launch/environment.sh"

make_environment "$(environment_folder "$root")"
cd "$root"
install_jaxrm cpu

say "Running: python -m jaxrm.train --config=configs/quickstart.py $*"
exec "$python" -m jaxrm.train --config=configs/quickstart.py "$@"
