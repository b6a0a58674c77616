"""The ``reward`` section of a config: where rewards come from, and how they become token rewards.

Rewards of several sources add up: ``config.rewards`` has such a section for each, under a name of its own, with a
weight. `sources_of` reads both forms.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxrm.algorithms.endpoint_config import EndpointConfig
from jaxrm.config import dicts
from jaxrm.config.fields import Bound, above, at_least, below, bounded, check, finite, one_of, place, typed, wrong
from jaxrm.errors import UserError, naming, option
from jaxrm.models import quantized
from jaxrm.models.build import DTYPES
from jaxrm.ops import reward_kinds

_SCALE = Bound(lambda scale: scale == "unit" or 0 < scale < math.inf, "unit or a finite number above 0", "unit")


def check_kind(kind: str, field: str, example: str) -> None:
    """Refuse what is no kind of token reward. One's own is not imported for it.

    Args:
      kind: to be checked.
      field: that gave it, for the message.
      example: what to type.

    Raises:
      UserError: with the kinds that there are.
    """
    module, _, function = kind.partition(":")
    own = all(part.isidentifier() for part in (*module.split("."), function))
    if kind not in reward_kinds.KINDS and not own:
        required = f"one of {', '.join(reward_kinds.KINDS)}, or one's own, package.module:function"
        raise UserError(field, repr(kind), required, example)


@dataclass(frozen=True)
class RewardKindConfig:
    """The kind of token reward that the evaluation of a reward model counts.

    Attributes:
      kind: as in `RewardConfig`; a scalar reward model has ``scalar``, ``scalar_length_residual`` and
        ``value_difference``. ``edit_aligned``, which costs a generation, is not evaluated here, and ``literal`` is.
      center: as in `RewardConfig`; with ``none`` nothing is taken off.
    """

    kind: str = "literal"
    center: Literal["running", "fixed", "none"] = "running"

    def __post_init__(self) -> None:
        check(self)
        check_kind(self.kind, place(self, "kind"), typed(self, "kind", "literal"))


@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier of the hub reads the policy's responses; what is None is as its makers have it.

    Attributes:
      max_length: most tokens of prompt and response; longer texts are cut on the side that its tokenizer truncates.
        None is the least of its tokenizer's ``model_max_length`` and its positions.
      template: chat template in place of its tokenizer's own: a name of `jaxrm.data.named_templates.TEMPLATES`, or a
        file of Jinja.
      dtype: compute dtype; None is that of ``config.model``.
      quantize: how its weights are stored, as in `jaxrm.models.build.ModelSource`.
    """

    max_length: int | None = bounded(None, at_least(1), meaning="that of its tokenizer and positions")
    template: str | None = None
    dtype: str | None = bounded(None, one_of(*DTYPES))
    quantize: str | None = bounded(None, one_of(*quantized.KINDS))

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class RewardConfig:
    """Where rewards come from, and how they become token rewards.

    The defaults are the paper's kind, since no other beats it (jaxrm/study/README.md). It is scaled to unit, so a KL
    coefficient means the same for all kinds. It is centered: without that, ``soft`` lost up to 0.14 of the judge's 1.

    Attributes:
      kind: one of `jaxrm.ops.reward_kinds.KINDS`; ``literal`` is the paper's, ``scalar`` and
        ``scalar_length_residual`` belong to a scalar reward model, a function or a judge, ``spans`` to a function,
        ``value_difference`` to a scalar reward model, ``dpo`` to a run of DPO, and the others to a seq2seq one;
        ``edit_aligned`` has it write a correction of every response. One's own is ``package.module:function``, see
        `jaxrm.ops.reward_kinds.reward_kind`.
      model: folder of the reward model's run; or a sequence classifier of one label, a folder or hub name, which needs
        no vocabulary in common with the policy.
      classifier: how such a classifier reads.
      function: in place of a reward model, for rewards that can be verified: ``package.module:name`` of a Python
        function ``(prompts, responses) -> rewards`` (see `jaxrm.stages.rewards.functions`), or the exact judge of an
        embedded task, ``task:safety``.
      function_workers: processes that call the function, each with a part of the batch; 0 calls it in the run's own.
      function_timeout: seconds that a call in one of them may take; None for any.
      endpoint: in place of both, a judge behind a chat endpoint (see `jaxrm.inference.endpoint_scorer`).
        What follows is set by a calibration pass before PPO and read there; a reward model's own evaluation reads
        ``center`` alone.
      scale: ``unit`` gives the sum over a response unit standard deviation over a calibration set; or a number.
      center: what is taken off each token's value in tag, ``soft`` and ``edit_aligned`` rewards: a ``running`` mean,
        the ``fixed`` mean of the calibration set, or ``none``.
      center_momentum: how much of the running mean survives an update.
      calibration_responses: responses of the SFT policy in the calibration set, at least; whole batches are taken, and
        of several sources so many as the one that wants most.
      weight: of this source in the sum of ``config.rewards``, after scale and center. A negative one makes a penalty; a
        source of weight 0 is logged, and adds nothing; its rewards must be finite all the same.
    """

    kind: str = "literal"
    model: str | None = None
    function: str | None = None
    function_workers: int = bounded(0, at_least(0))
    function_timeout: float | None = bounded(None, above(0), finite)
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    endpoint: EndpointConfig | None = None
    scale: float | Literal["unit"] = bounded("unit", _SCALE)
    center: Literal["running", "fixed", "none"] = "running"
    center_momentum: float = bounded(0.9, at_least(0), below(1))
    calibration_responses: int = bounded(256, at_least(2))
    weight: float = bounded(1.0, finite)

    def __post_init__(self) -> None:
        check(self)
        check_kind(self.kind, place(self, "kind"), typed(self, "kind", "literal"))
        given = self._given()
        if len(given) > 1:
            (a, first), (b, second), *_ = given.items()
            raise UserError(
                f"{place(self)} has both {a} {first!r} and {b} {second!r}; a source is one of them, e.g. "
                f"{typed(self, b, None)}; two sources are two names of config.rewards"
            )
        whole = reward_kinds.names_for("scalar", "response")
        for name, kinds in (("function", (*whole, *reward_kinds.names_for("text"))), ("endpoint", whole)):
            if name in given and self.kind not in kinds:
                required = f"one of {', '.join(kinds)}, since {place(self, name)} reads text"
                raise wrong(self, "kind", required, "scalar")
        self._check_processes()

    def _check_processes(self) -> None:
        """Refuse processes without a function, and what needs processes without any."""
        for name in ("function_workers", "function_timeout"):
            if self.function is None and getattr(self, name):
                raise wrong(self, name, f"left out without {place(self, 'function')}", getattr(type(self), name))
        if self.function_timeout is not None and not self.function_workers:
            required = f"None without {place(self, 'function_workers')}, since a function that hangs in the run itself "
            raise wrong(self, "function_timeout", required + "cannot be stopped", None)
        if self.function_workers and str(self.function).startswith("__main__:"):
            raise wrong(self, "function", "in a module, which worker processes can import", "my_rewards:score")

    @property
    def is_given(self) -> bool:
        """Whether it says where rewards come from."""
        return bool(self._given())

    def _given(self) -> dict[str, str]:
        """What it gives of model, function and endpoint, as text."""
        url = None if self.endpoint is None else self.endpoint.url
        origins = {"model": self.model, "function": self.function, "endpoint": url}
        return {name: value for name, value in origins.items() if value is not None}


def sources_of(config: Any) -> Mapping[str, RewardConfig]:
    """The sources of rewards of a stage's config, by name: those of ``config.rewards``, else ``reward``.

    A source is read, and named in messages, within `naming_source`.
    """
    return config.rewards or {"reward": config.reward}


def has_rewards(config: Any) -> bool:
    """Whether a stage's config says where rewards come from."""
    return all(source.is_given for source in sources_of(config).values())


def in_words(config: Any) -> str:
    """The kinds of a stage's rewards for people: ``literal``; of a sum ``helpful (literal) + 0.5 * brief (scalar)``."""
    if not config.rewards:
        return config.reward.kind
    weights = {name: "" if source.weight == 1 else f"{source.weight:g} * " for name, source in config.rewards.items()}
    return " + ".join(f"{weights[name]}{name} ({source.kind})" for name, source in config.rewards.items())


def source_fields(
    weights: Mapping[str, float], rewards: Mapping[str, Any], *, tokens: bool = True
) -> dict[str, dict[str, Any]]:
    """What each source of a sum gave one response, for the rows of files: ``weight``, ``reward`` and ``rewards``.

    Args:
      weights: of the sources, by name.
      rewards: ``[T]`` of each source, calibrated and before its weight.
      tokens: whether ``rewards``, those of the single tokens, are given.
    """
    fields: dict[str, dict[str, Any]] = {}
    for name, weight in weights.items():
        own = [float(x) for x in rewards[name]]
        fields[name] = {"weight": weight, "reward": sum(own)} | ({"rewards": own} if tokens else {})
    return fields


def weights_of(config: Any) -> dict[str, float]:
    """Weights of the sources of a sum; ``{}`` of one source."""
    return {name: source.weight for name, source in config.rewards.items()}


@contextmanager
def naming_source(config: Any, name: str) -> Iterator[None]:
    """Name the options of a source by its place: ``option("reward.kind")`` is ``config.rewards.NAME.kind``.

    Args:
      config: of the stage.
      name: of the source, from `sources_of`.
    """
    with naming({"reward": option(f"rewards.{name}" if config.rewards else "reward")}):
        yield


def check_sources(config: Any) -> None:
    """Refuse sources that contradict each other; the ``__post_init__`` of a stage with rewards calls it.

    Raises:
      UserError: one source beside several, a weight of one alone, or several of weight 0.
    """
    reward, rewards = place(config, "reward"), place(config, "rewards")
    if not config.rewards:
        if config.reward.weight != 1:
            raise UserError(
                f"{reward}.weight is {config.reward.weight:g}, but a weight is for one of several sources, in {rewards}"
                f"; one alone is sized by its scale, or the KL coefficient"
            )
        return
    if given := dicts.differences(config.reward, RewardConfig()):
        leave = "leave it out"
        if reward.startswith("config."):
            leave = f"give {' '.join(f'--{reward}.{name}={default}' for name, _, default in given)}"
        raise UserError(
            f"{reward} is given beside {rewards}, which has {', '.join(config.rewards)}; make it one of them, "
            f"{rewards}.NAME, and {leave}"
        )
    for name, source in config.rewards.items():
        if not source.is_given:
            raise UserError(
                f"{rewards}.{name} has no model, function or endpoint, so it rewards nothing; give one, e.g. "
                f"{_typed(rewards, name, 'model', 'runs/quickstart/rm_seq2seq')}, or leave {name} out"
            )
    if all(source.weight == 0 for source in config.rewards.values()):
        first = next(iter(config.rewards))
        raise UserError(
            f"{rewards} has weight 0 for every source, so there is nothing to learn from; e.g. "
            f"{_typed(rewards, first, 'weight', 1.0)}"
        )


def check_early_end_penalty(config: Any) -> None:
    """Refuse a penalty for early ends where no source tags tokens, so that no end could be early.

    Raises:
      UserError: naming the penalty and the kinds.
    """
    kinds = [source.kind for source in sources_of(config).values()]
    if config.ppo.early_end_penalty and not any(map(reward_kinds.tags_tokens, kinds)):
        penalty = f"{place(config, 'ppo')}.early_end_penalty"
        raise UserError(
            f"{penalty} is {config.ppo.early_end_penalty:g}, but a seq2seq reward model alone says where a response "
            f"should go on, and the kind of the rewards is {', '.join(kinds)}; "
            f"give {typed(config, 'ppo.early_end_penalty', 0.0)}"
        )


def _typed(rewards: str, name: str, field: str, value: Any) -> str:
    """A field of a named source as the person gives it, in Python or on a command line."""
    if rewards.startswith("config"):
        return f"--{rewards}.{name}.{field}={value}"
    return f"{name}=RewardConfig({field}={value!r})"
