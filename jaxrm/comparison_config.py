"""The sections of a config that say which policies are compared, on which prompts, and who judges."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jaxrm.algorithms.endpoint_config import EndpointConfig
from jaxrm.config.fields import above, at_least, below, bounded, check, one_of, place, typed
from jaxrm.errors import UserError
from jaxrm.models.build import DTYPES
from jaxrm.models.sampling import SamplingConfig
from jaxrm.ops.reward_kinds import KINDS

# Fields of an endpoint that ask for a score of one answer; a comparison asks which of two is better.
_OF_SCORES = ("rubric", "answer", "reference", "unreadable")


@dataclass(frozen=True)
class ComparedPolicyConfig:
    """A policy, or the answers of one.

    Attributes:
      path: folder of a run, hub name, folder of published weights, or GGUF file.
      adapter: adapters that stand on those weights.
      seeds: further runs of the same training with other seeds, each a path of its own; intervals then count seeds.
      answers: in place of a path, a JSONL file of answers that another program wrote: rows with ``prompt`` and
        ``response``, one for each prompt that is compared.
      tokenizer: for published weights without one.
      template: chat template of published weights; None is the tokenizer's own.
      dtype: compute dtype; None is that of the training, or float32.
    """

    path: str | None = None
    adapter: str | None = None
    seeds: tuple[str, ...] = ()
    answers: str | None = None
    tokenizer: str | None = None
    template: str | None = None
    dtype: str | None = bounded(None, one_of(*DTYPES))

    def __post_init__(self) -> None:
        check(self)
        if (self.path is None) == (self.answers is None):
            raise UserError(
                f"{place(self)} has {'neither path nor' if self.path is None else 'both path and'} answers; a policy "
                f"is one of them, e.g. {typed(self, 'path', 'runs/quickstart/sft')}"
            )
        for name in ("adapter", "seeds", "tokenizer", "template", "dtype"):
            if self.answers is not None and getattr(self, name):
                raise UserError(
                    f"{place(self, name)} is {getattr(self, name)!r}, but {place(self, 'answers')} has the answers and "
                    f"no model gives any; use {typed(self, name, () if name == 'seeds' else None)}"
                )
        self._check_runs()

    def _check_runs(self) -> None:
        """Refuse a run that is given twice: it would count as two seeds, whose agreement narrows intervals."""
        if self.path is None:
            return
        by_place = {_normalized(self.path): self.path}
        for path in self.seeds:
            by_place.setdefault(_normalized(path), path)
        if len(by_place) < 1 + len(self.seeds):
            others = tuple(by_place.values())[1:]
            raise UserError(
                f"{place(self, 'seeds')} is {self.seeds!r}, which names a run twice, or the run of "
                f"{place(self, 'path')}, {self.path!r}; give each run once, e.g. {typed(self, 'seeds', others)}"
            )


def _normalized(path: str) -> Path:
    """A path as it is compared with others: ``runs/a/`` and ``runs/../runs/a`` are one run, and so may a link be."""
    return Path(path).expanduser().resolve()


@dataclass(frozen=True)
class PromptSetConfig:
    """Prompts of one nature.

    Attributes:
      path: a file in any schema that jaxrm reads; ``set:plain``, ``set:harmless`` (they look harmful and are not) or
        ``set:harmful``, which come with jaxrm; or an embedded task, ``task:safety``.
      split: of an embedded task, ``heldout``, ``selection``, ``test`` or ``test_ood``; of a data set or a folder its
        split; None is ``heldout`` of a task, and else all of them.
      held_out_share: only the prompts that a stage with this ``data.eval_share`` holds out of the same records, by
        their hash; None for all.
      label: ``harmless`` or ``harmful``, whether a good answer helps or refuses; None where prompts are mixed. Sets
        that come with jaxrm have theirs.
      max_prompts: the first so many; None for all.
    """

    path: str = ""
    split: str | None = None
    held_out_share: float | None = bounded(None, above(0), below(1))
    label: Literal["harmless", "harmful"] | None = None
    max_prompts: int | None = bounded(None, at_least(1))

    def __post_init__(self) -> None:
        check(self)
        if not self.path:
            raise UserError(f"{place(self, 'path')} is empty; give prompts, e.g. {typed(self, 'path', 'set:plain')}")


@dataclass(frozen=True)
class ComparisonJudgeConfig:
    """Who says which of two answers is better; one of the first four fields is given.

    Attributes:
      reward_model: a reward model of any sort, a run or a classifier of the hub; the higher reward wins.
      function: ``package.module:name`` of a function ``(prompts, responses) -> scores``, as for rewards, also with
        ``fields``, the columns of the prompts' records; or the exact judge of an embedded task, ``task:safety``. The
        higher score wins.
      language_model: a run or published weights, which is asked which answer is better, in both orders. Its verdict is
        read from the log-probs of two words, without sampling.
      endpoint: a model behind a chat endpoint, asked the same question in both orders. A reply that is neither word,
        asked once more, is no verdict, and is counted.
      kind: of token reward of a ``reward_model``, None for that of its run; not ``scalar_length_residual``, which is
        fitted on the answers that are scored, so that a score would depend on which answers those are.
      prompt: of a ``language_model`` or an ``endpoint``: ``helpfulness``, ``harmlessness``, ``summary``, or a text file
        that holds {prompt}, {first} and {second}, and may hold {first_word} and {second_word}.
      words: the two replies, for the first answer and for the second; each must be a token of a ``language_model``.
      dtype: compute dtype of a model; None is that of its training, or float32.
    """

    reward_model: str | None = None
    function: str | None = None
    language_model: str | None = None
    endpoint: EndpointConfig | None = None
    kind: str | None = None
    prompt: str = "helpfulness"
    words: tuple[str, ...] = ("A", "B")
    dtype: str | None = bounded(None, one_of(*DTYPES))

    def __post_init__(self) -> None:
        check(self)
        origins = ("reward_model", "function", "language_model", "endpoint")
        given = [name for name in origins if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(
                f"{place(self)} has {' and '.join(given) or 'no judge'}; a judge is one of {', '.join(origins)}, e.g. "
                f"{typed(self, 'function', 'task:safety')}"
            )
        if self.kind is not None and self.reward_model is None:
            self._refuse("kind", None, "reward models")
        if self.kind in KINDS and KINDS[self.kind].removes_length:
            raise UserError(
                f"{place(self, 'kind')} is {self.kind!r}, which is fitted on the answers of a batch, so the scores of "
                f"two batches cannot be compared; use {typed(self, 'kind', 'scalar')}, and read the length-controlled "
                "win rate"
            )
        if self.prompt != "helpfulness" and not self.is_pairwise:
            self._refuse("prompt", "helpfulness", "a language_model or an endpoint")
        if self.words != ("A", "B") and not self.is_pairwise:
            self._refuse("words", ("A", "B"), "a language_model or an endpoint")
        if len(self.words) != 2 or not all(word.strip() for word in self.words) or self.words[0] == self.words[1]:
            raise UserError(
                f"{place(self, 'words')} is {self.words!r}; required two different words, the replies for the first "
                f"answer and for the second, e.g. {typed(self, 'words', ('A', 'B'))}"
            )
        if self.dtype is not None and self.reward_model is None and self.language_model is None:
            self._refuse("dtype", None, "a reward_model or a language_model")
        if self.endpoint is not None:
            self._check_endpoint(self.endpoint)

    @property
    def is_pairwise(self) -> bool:
        """Whether it compares two answers, where others score each alone."""
        return self.language_model is not None or self.endpoint is not None

    def _refuse(self, name: str, default: Any, owners: str) -> None:
        raise UserError(
            f"{place(self, name)} is {getattr(self, name)!r}, which is for {owners}; use {typed(self, name, default)}"
        )

    def _check_endpoint(self, endpoint: EndpointConfig) -> None:
        default = EndpointConfig(url=endpoint.url, model=endpoint.model)
        for name in _OF_SCORES:
            if getattr(endpoint, name) != getattr(default, name):
                raise UserError(
                    f"{place(self, 'endpoint')}.{name} asks for a score of one answer, but a comparison asks which of "
                    f"two is better; leave it out, and use {typed(self, 'prompt', 'my_question.txt')} for another "
                    "question"
                )


@dataclass(frozen=True)
class CompareConfig:
    """How policies answer and are compared.

    Attributes:
      against: ``first`` compares every policy with the first one, ``all`` each with each.
      decodings: ``sampled``, as ``sampling`` says, and ``greedy``.
      sampling: how.
      batch_size: prompts answered, and answers judged, at once.
      max_length: most tokens that a judge, or the reference, reads of prompt and answers; a pair that is longer gets no
        verdict of a language model, and is counted. A judge's question that is longer by itself is refused.
      reference: a run or published weights; KL of the sampled answers to it, at the sampling temperature, and their
        perplexity under it, at 1, are measured.
      refusals: whether refusals are counted against labels, for which every set needs one; None does it for sets that
        have one.
      refusal_judge: name of a judge, a language model or an endpoint, that says whether an answer refuses; None goes
        by rules, see `jaxrm.evaluation.refusals`.
      token_rewards: answers of each set whose token rewards are on the page, by the first reward model of ``judges``.
    """

    against: Literal["first", "all"] = "first"
    decodings: tuple[str, ...] = ("sampled", "greedy")
    sampling: SamplingConfig = field(default_factory=lambda: SamplingConfig(max_new_tokens=128))
    batch_size: int = bounded(16, at_least(1))
    max_length: int = bounded(2048, above(1))
    reference: str | None = None
    refusals: bool | None = None
    refusal_judge: str | None = None
    token_rewards: int = bounded(20, at_least(0))

    def __post_init__(self) -> None:
        check(self)
        if not self.decodings or not set(self.decodings) <= {"sampled", "greedy"}:
            raise UserError(
                f"{place(self, 'decodings')} is {self.decodings!r}; it must be sampled, greedy or both, e.g. "
                f"{typed(self, 'decodings', ('sampled', 'greedy'))}"
            )
        if len(set(self.decodings)) < len(self.decodings):
            raise UserError(f"{place(self, 'decodings')} is {self.decodings!r}; name each one once")


def check_comparison(config: Any) -> None:
    """Refuse a comparison of fewer than two policies, without prompts, or that asks for what its parts cannot give.

    Args:
      config: a `jaxrm.stage_config.Compare`.

    Raises:
      UserError: naming the field.
    """
    judges: Mapping[str, ComparisonJudgeConfig] = config.judges
    policies: Mapping[str, ComparedPolicyConfig] = config.policies
    if len(policies) < 2:
        raise UserError(
            f"config.policies has {len(policies)} policies; a comparison needs two, e.g. "
            "--config.policies.sft.path=runs/quickstart/sft --config.policies.ppo.path=runs/quickstart/ppo_seq2seq"
        )
    if not config.prompts:
        raise UserError("config.prompts is empty; give sets of prompts, e.g. --config.prompts.plain.path=set:plain")
    counts = {name: len(policy.seeds) for name, policy in policies.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise UserError(
            f"config.policies have different numbers of seeds ({listed}); runs are compared seed by seed, so give each "
            "as many"
        )
    asker = config.compare.refusal_judge
    if asker is not None and (asker not in judges or not judges[asker].is_pairwise):
        known = [name for name, judge in judges.items() if judge.is_pairwise]
        raise UserError(
            f"config.compare.refusal_judge is {asker!r}; required the name of a judge that is a language_model or an "
            f"endpoint, {' or '.join(known) or 'of which there is none'}, or None, which goes by rules"
        )
