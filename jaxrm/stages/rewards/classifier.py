"""A sequence classifier of the hub as a source of rewards: its score of a whole response, read by its own tokenizer."""

import dataclasses
from pathlib import Path
from typing import Any

from jaxrm.algorithms.reward_config import ClassifierConfig, RewardConfig
from jaxrm.algorithms.rollout import RewardSource
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.classifier import Classifier
from jaxrm.inference.open_classifier import describe_classifier, read_weights
from jaxrm.inference.run_checkpoint import is_run
from jaxrm.models.hub import is_hub_name
from jaxrm.stages.rewards.scored import Responses, Scored
from jaxrm.stages.rewards.summed import scorers_of
from jaxrm.stages.rewards.text import open_text_rewards


def names_classifier(path: str) -> bool:
    """Whether ``config.reward.model`` names published weights, which as a source of rewards are a classifier.

    A run that is not there may look like a name of the hub, but its first part is ``runs``, or a folder.
    """
    place = Path(path).expanduser()
    if is_run(path):
        return False
    if place.exists():
        return place.is_file() or (place / "config.json").is_file()
    return is_hub_name(path) and place.parts[0] != "runs" and not place.parent.is_dir()


def refuse_options(source: RewardConfig) -> None:
    """Refuse options of a classifier where there is none to follow them.

    Raises:
      UserError: naming the first.
    """
    for name, default in vars(ClassifierConfig()).items():
        if getattr(source.classifier, name) != default:
            field = f"reward.classifier.{name}"
            raise UserError(
                f"{option(field)} is {getattr(source.classifier, name)!r}, but {option('reward')} has no classifier of "
                f"the hub, whose option it is; leave it out, {flag(field)}={default}"
            )


def check_classifier(source: RewardConfig, scored: Scored) -> str:
    """Refuse a classifier that cannot score the prompts, or not as the kind, before its weights are read; its name."""
    classifier = _described(source, scored)
    classifier.check_kind(source.kind, "reward.kind")
    classifier.check_roles([example.messages for example in scored.examples])
    return f"the classifier {classifier.name}"


def open_classifier_rewards(source: RewardConfig, responses: Responses) -> RewardSource:
    """Rewards of a classifier."""
    classifier = _described(source, responses)
    key = classifier.model.source
    if key not in responses.classifiers:
        responses.classifiers[key] = read_weights(classifier)
    opened = dataclasses.replace(classifier, weights=responses.classifiers[key])
    return open_text_rewards(opened, source, responses)


def _described(source: RewardConfig, scored: Scored) -> Classifier:
    """The classifier without its weights; a share of the batch is scored at once, as by other reward models."""
    config: Any = scored.config
    return describe_classifier(
        str(source.model),
        source.classifier,
        mesh=scored.mesh,
        dtype=config.model.dtype,
        attention=config.model.attention,
        rows=-(-config.data.batch_size // config.num_microbatches),
    )


def cut_shares(source: RewardSource) -> dict[str, float]:
    """Shares of the texts scored last that classifiers did not read whole, as fields of a row; else there are none.

    They are ``texts_cut`` and ``texts_changed`` by the template, or ``texts_cut/NAME`` of a named source.
    """
    shares: dict[str, float] = {}
    for name, scorer in scorers_of(source).items():
        if isinstance(scorer, Classifier):
            suffix = f"/{name}" if name else ""
            shares[f"texts_cut{suffix}"] = scorer.counts.cut_share
            shares[f"texts_changed{suffix}"] = scorer.counts.changed_share
    return shares
