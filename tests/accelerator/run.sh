#!/usr/bin/env bash
# What an accelerator does with jaxrm, in less than nine minutes: tests/accelerator/run.sh
#
# Correctness against the CPU, then speed and memory of training, scoring, decoding and PPO. It ends with a table in
# Markdown and a file of JSON. It installs nothing: run it where JAX sees the GPU or TPU, from any folder.
#
#   tests/accelerator/run.sh --list                   the checks by name
#   tests/accelerator/run.sh --only=float32,sft       some of them
#   tests/accelerator/run.sh --shape=tiny             on a CPU, in two minutes
#   PYTHON=.venv/bin/python tests/accelerator/run.sh  another Python than python3
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
python=${PYTHON:-python3}

"$python" - <<'PYTHON' || exit 2
import importlib.util
import sys

if sys.version_info < (3, 11):
    sys.exit(f"Python is {sys.version.split()[0]}; jaxrm needs 3.11 or newer, e.g. PYTHON=python3.12 tests/accelerator/run.sh")
lacking = [name for name in ("jax", "flax", "optax", "chex", "jinja2", "numpy") if importlib.util.find_spec(name) is None]
if lacking:
    sys.exit(f"{sys.executable} lacks {', '.join(lacking)}; type {sys.executable} -m pip install {' '.join(lacking)}")
PYTHON

export PYTHONPATH="$root:$root/tests${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m accelerator.run "$@"
