"""Train what a config describes.

    python -m jaxrm.train --config=configs/quickstart.py --config.optimizer.lr=3e-4

Exit status: 0 done; 2 something to mend, said in one line; 75 asked to stop (SIGTERM, Ctrl-C) and saved: the same
command continues.
"""

import sys

from absl import flags

from jaxrm import command_line
from jaxrm.experiment import Experiment


def main(config: Experiment, _: flags.FlagValues) -> int:
    """Run the stage that the config names."""
    if config.algorithm == "sft":
        from jaxrm.stages import sft

        return sft.run(config)
    if config.algorithm == "sample_pairs":
        from jaxrm.stages import sample_pairs

        return sample_pairs.run(config)
    if config.algorithm in ("seq2seq_rm", "scalar_rm"):
        from jaxrm.stages import reward_model

        return reward_model.run(config)
    raise AssertionError(config.algorithm)  # Experiment refuses other names


if __name__ == "__main__":
    sys.exit(command_line.run(main, Experiment))
