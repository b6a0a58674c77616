"""One check in this process: ``python -m accelerator.one_check NAME --shape=tiny --report=FILE``."""

import argparse
import importlib
import os
import sys
import traceback
from pathlib import Path

from accelerator.checks import BY_NAME
from accelerator.report import LeftOutError, Report
from accelerator.shapes import SHAPES


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=list(BY_NAME))
    parser.add_argument("--shape", choices=list(SHAPES), required=True)
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    check, report = BY_NAME[arguments.name], Report(arguments.report)
    try:
        if not check.is_torch:
            report.doing("start of JAX")
            _describe(report, arguments.shape)
        module, _, function = check.function.partition(":")
        getattr(importlib.import_module(f"accelerator.{module}"), function)(SHAPES[arguments.shape], report)
    except LeftOutError as reason:
        report.end("left out", str(reason))
    except Exception as error:
        traceback.print_exc()
        message = " ".join(str(error).split())
        report.end("failed", f"{type(error).__name__}: {message}"[:300])
        return 1
    else:
        report.end("done")
    return 0


def _describe(report: Report, shape: str) -> None:
    import jax

    from jaxrm.runtime.hardware import device_memory
    from jaxrm.runtime.provenance import describe_devices, package_versions

    memory, devices = device_memory(), describe_devices()
    report.setting(
        **devices,
        memory_gib=None if memory is None else memory.limit,
        versions={name: version for name, version in package_versions().items() if version},
        backend=jax.devices()[0].client.platform_version,
    )
    if shape == "full" and devices["platform"] == "cpu":
        raise NoAcceleratorError(
            "JAX sees no accelerator: install it for this machine, pip install 'jax[tpu]' or 'jax[cuda13]', or use "
            "--shape=small"
        )


class NoAcceleratorError(Exception):
    """The shape is too large for a CPU."""


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a backend that hangs at its end takes nobody's time
