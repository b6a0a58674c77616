"""Compare policies: on sets of prompts, by judges, with win rates, refusals, lengths and a page.

    python -m jaxrm.compare --config=configs/compare_quickstart.py
    python -m jaxrm.compare --config=configs/compare_quickstart.py --config.judges.lm.language_model=WEIGHTS

Answers and verdicts are kept in config.run_dir. A comparison that was stopped goes on where it was, and one that has a
new policy, set of prompts or judge asks only what is new. ``python -m jaxrm.train`` runs the same stage, also as a part
of a pipeline. In Python: ``jaxrm.compare(config)``.
"""

import sys
import types
from typing import Any

from jaxrm.runtime import preemption

if __name__ == "__main__":
    preemption.leave_on_signals()  # before the imports below, which take seconds

from jaxrm import train
from jaxrm.config import command_line
from jaxrm.stage_config import Compare


class _CallableModule(types.ModuleType):
    """``jaxrm.compare`` is a function of the package and this module, so the module can be called too."""

    def __call__(self, config: Compare) -> Any:
        from jaxrm.stages.compare.run import compare

        return compare(config)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    sys.exit(command_line.run(train.main, (Compare,), define_flags=train.define_flags))
