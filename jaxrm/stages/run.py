"""Which stage runs a config: one explicit chain, by the name of the algorithm."""

from jaxrm.experiment import Experiment


def run_stage(config: Experiment) -> int:
    """Run one stage, by the name of its algorithm; returns the exit status."""
    if config.algorithm == "sft":
        from jaxrm.stages import sft

        return sft.run(config)
    if config.algorithm == "sample_pairs":
        from jaxrm.stages import sample_pairs

        return sample_pairs.run(config)
    if config.algorithm in ("seq2seq_rm", "scalar_rm"):
        from jaxrm.stages.reward_model import run as reward_model

        return reward_model.run(config)
    if config.algorithm == "ppo":
        from jaxrm.stages.ppo import run as ppo

        return ppo.run(config)
    if config.algorithm == "dpo":
        from jaxrm.stages.dpo import run as dpo

        return dpo.run(config)
    if config.algorithm == "best_of_n":
        from jaxrm.stages.best_of_n import run as best_of_n

        return best_of_n.run(config)
    if config.algorithm == "evaluate":
        from jaxrm.stages.evaluate import run as evaluate

        return evaluate.run(config)
    raise AssertionError(config.algorithm)  # Experiment refuses other names
