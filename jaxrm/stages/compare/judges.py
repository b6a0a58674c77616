"""What the judges say: scores of single answers, or which of two answers is better, each asked once and kept.

In the run's folder ``verdicts/`` has a file for each judge. Its name ends with a hash of the judge. A row has the hash
of the texts that were judged, so the same answer is judged once, whoever gave it, and a judge can be added later.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxrm.comparison_config import ComparisonJudgeConfig
from jaxrm.data import tasks
from jaxrm.data.prompts import transcript
from jaxrm.data.records import Message
from jaxrm.data.responses import Response
from jaxrm.errors import UserError, flag, naming, option
from jaxrm.inference import run_checkpoint, weights
from jaxrm.inference.chat_endpoint import ChatEndpoint
from jaxrm.inference.load import load_policy, load_reward_model, shape_and_tokenizer
from jaxrm.inference.pair_judge import (
    Asker,
    EndpointAsker,
    LanguageModelAsker,
    PairQuestion,
    pair_texts,
    question_ids,
    read_pair_question,
    refusal_texts,
    verdict_ids,
)
from jaxrm.inference.reward_kind import kind_of
from jaxrm.inference.text_scorer import TextSample
from jaxrm.models.build import ModelSource
from jaxrm.ops.reward_kinds import KINDS
from jaxrm.runtime.progress import Progress
from jaxrm.runtime.row_log import RowLog
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stage_config import REWARD_MODELS, Compare
from jaxrm.stages.rewards.function_call import open_function, source_digest, takes_fields
from jaxrm.stages.rewards.functions import FunctionScorer


@dataclass(frozen=True)
class JudgedAnswer:
    """An answer to a prompt.

    Attributes:
      prompt: the turns before it.
      response: its text.
      fields: the columns of the prompt's record, for a judge that reads them; else None.
    """

    prompt: Sequence[Message]
    response: str
    fields: Mapping[str, Any] | None = None

    @property
    def key(self) -> str:
        """Hash of the texts, and of the columns where the judge reads them."""
        texts = [transcript(self.prompt), self.response]
        return _digest(texts if self.fields is None else [*texts, dict(self.fields)])


def reads_fields(config: Compare, name: str) -> bool:
    """Whether a judge is a function that reads the columns of the prompts' records.

    Raises:
      UserError: naming the judge; there is no such function.
    """
    judge = config.judges[name]
    with named_judge(name, judge):
        return judge.function is not None and takes_fields(open_function(judge.function))


def check_judges(config: Compare, prompts: Iterable[Sequence[Message]]) -> None:
    """Refuse judges that cannot judge, before anything is answered; no weights are read and nothing is asked.

    Args:
      config: of the stage.
      prompts: all of them, which the exact judge of a task must know.

    Raises:
      UserError: naming the judge.
    """
    every = list(prompts)
    for name, judge in config.judges.items():
        with named_judge(name, judge):
            if judge.is_pairwise:
                read_pair_question(judge, f"judges.{name}.prompt")
            if judge.endpoint is not None:
                ChatEndpoint(judge.endpoint, f"judges.{name}.endpoint")
            if judge.function is not None:
                open_function(judge.function)
                _check_task(name, judge.function, every)
            if judge.reward_model is not None and run_checkpoint.is_run(judge.reward_model):
                run = run_checkpoint.find_checkpoint(judge.reward_model, "path", algorithms=REWARD_MODELS)
                _check_kind(name, judge, kind_of(run))
            if judge.language_model is not None:
                _check_language_model(config, name)


def _check_kind(name: str, judge: ComparisonJudgeConfig, recorded: str) -> None:
    """Refuse a run whose own kind is fitted on the answers of a batch, as the config refuses that kind where given."""
    if judge.kind is None and recorded in KINDS and KINDS[recorded].removes_length:
        raise UserError(
            f"{option(f'judges.{name}.reward_model')} is {judge.reward_model!r}, a run of the kind {recorded}, which "
            f"is fitted on the answers of a batch; use {flag(f'judges.{name}.kind')}=scalar, and read the "
            "length-controlled win rate"
        )


def _check_language_model(config: Compare, name: str) -> None:
    """Refuse a language model that is not there, whose tokenizer lacks the words, or that can read no question."""
    judge, field = config.judges[name], f"judges.{name}.language_model"
    path, nothing = str(judge.language_model), [Message("user", "")]
    shape, tokenizer, template = shape_and_tokenizer(path)
    prefix, _ = verdict_ids(tokenizer, template, judge.words, path, field)

    def check_length(place: str, value: str, question: str) -> None:
        length = len(question_ids(tokenizer, template, question, prefix))
        where = f"{option(place)} is {value!r}, whose question has {length:,} tokens before any answer stands in it"
        if length > shape.max_position:
            raise UserError(
                f"{where}, but {path} reads at most {shape.max_position:,}; give a shorter question or a model that "
                f"reads more, e.g. {flag(field)}=HuggingFaceTB/SmolLM2-135M-Instruct"
            )
        if length > config.compare.max_length:
            raise UserError(
                f"{where}, but {option('compare.max_length')} is {config.compare.max_length:,}; leave room for the "
                f"answers, e.g. {flag('compare.max_length')}={min(shape.max_position, 2 * length)}"
            )

    place = f"judges.{name}.prompt"
    (question,) = pair_texts(read_pair_question(judge, place), [PairQuestion(nothing, "", "")], judge.words)
    check_length(place, judge.prompt, question)
    if config.compare.refusal_judge == name:
        check_length("compare.refusal_judge", name, *refusal_texts([nothing], [""], judge.words))


def check_reachable(config: Compare) -> None:
    """Refuse endpoints that cannot be reached."""
    for name, judge in config.judges.items():
        if judge.endpoint is not None:
            with named_judge(name, judge):
                ChatEndpoint(judge.endpoint, f"judges.{name}.endpoint").check()


def score_answers(
    config: Compare, name: str, folder: Path, answers: Sequence[JudgedAnswer], *, show_progress: bool
) -> dict[str, float]:
    """Score of each answer by a judge that scores, by key."""
    judge = config.judges[name]
    log = RowLog(folder / "verdicts" / f"{name}-{identity_of_judge(judge)}.jsonl")
    scores = {row["answer"]: float(row["score"]) for row in log.rows}
    unique = {answer.key: answer for answer in answers}
    missing = [answer for key, answer in unique.items() if key not in scores]
    if missing:
        done = len(unique) - len(missing)
        with (
            named_judge(name, judge),
            Progress(name, len(unique), unit="answers", done=done, enabled=show_progress) as bar,
        ):
            score = _open_scorer(config, judge)
            for start in range(0, len(missing), config.compare.batch_size):
                block = missing[start : start + config.compare.batch_size]
                new = dict(zip([each.key for each in block], map(float, score(block)), strict=True))
                log.append({"answer": key, "score": value} for key, value in new.items())
                scores |= new
                done += len(block)
                bar.update(done)
    return {answer.key: scores[answer.key] for answer in answers}


def ask_pairs(
    config: Compare, name: str, folder: Path, pairs: Sequence[tuple[JudgedAnswer, JudgedAnswer]], *, show_progress: bool
) -> np.ndarray:
    """What a judge says of pairs in both orders.

    Returns:
      ``[2, N]``: the share of the first place with the first answer there, and with the second; NaN where there
      is no verdict.
    """
    judge = config.judges[name]
    template = read_pair_question(judge, f"judges.{name}.prompt")
    questions = [PairQuestion(a.prompt, *texts) for a, b in pairs for texts in _both_orders(a.response, b.response)]
    shares = _ask(config, name, folder, pair_texts(template, questions, judge.words), show_progress=show_progress)
    return shares.reshape(-1, 2).T


def ask_refusals(
    config: Compare, name: str, folder: Path, answers: Sequence[JudgedAnswer], *, show_progress: bool
) -> dict[str, bool]:
    """Whether each answer refuses, by a judge that is asked, by key; what it could not read is left out."""
    unique = {answer.key: answer for answer in answers}
    prompts, responses = [each.prompt for each in unique.values()], [each.response for each in unique.values()]
    texts = refusal_texts(prompts, responses, config.judges[name].words)
    shares = _ask(config, name, folder, texts, show_progress=show_progress)
    return {key: bool(share > 0.5) for key, share in zip(unique, shares, strict=True) if not np.isnan(share)}


def _ask(config: Compare, name: str, folder: Path, texts: Sequence[str], *, show_progress: bool) -> np.ndarray:
    """Share of the first word in the reply to each question; each is asked once."""
    judge = config.judges[name]
    log = RowLog(folder / "verdicts" / f"{name}-{identity_of_judge(judge)}-{config.compare.max_length}.jsonl")
    shares = {row["question"]: np.nan if row["share"] is None else float(row["share"]) for row in log.rows}
    keys = [_digest([text]) for text in texts]
    missing = {key: text for key, text in zip(keys, texts, strict=True) if key not in shares}
    if missing:
        total, rows = len(set(keys)), config.compare.batch_size
        done = total - len(missing)
        with (
            named_judge(name, judge),
            Progress(name, total, unit="questions", done=done, enabled=show_progress) as bar,
        ):
            asker = _open_asker(config, name)
            waiting = list(missing.items())
            block_size = rows * (16 if judge.endpoint is not None else 4)  # sorted by length inside a block
            for start in range(0, len(waiting), block_size):
                block = waiting[start : start + block_size]
                replies = asker.ask([text for _, text in block])
                new = {key: float(share) for (key, _), share in zip(block, replies, strict=True)}
                log.append({"question": key, "share": None if np.isnan(share) else share} for key, share in new.items())
                shares |= new
                bar.update(done + start + len(block))
            if isinstance(asker, EndpointAsker) and show_progress:
                cost = asker.endpoint.cost
                tokens = f"{cost.prompt_tokens:,} tokens in, {cost.completion_tokens:,} out"
                print(f"{name}: {cost.calls:,} calls, {cost.cached:,} answers from the cache, {tokens}")
    return np.array([shares[key] for key in keys])


def _open_asker(config: Compare, name: str) -> Asker:
    judge, compare = config.judges[name], config.compare
    if judge.endpoint is not None:
        field = f"judges.{name}.endpoint"
        return EndpointAsker(ChatEndpoint(judge.endpoint, field), judge.words, field)
    policy = load_policy(str(judge.language_model), mesh=build_mesh(config.mesh), dtype=judge.dtype)
    field = f"judges.{name}.language_model"
    return LanguageModelAsker(policy, field, judge.words, max_length=compare.max_length, batch_size=compare.batch_size)


def _open_scorer(config: Compare, judge: ComparisonJudgeConfig) -> Callable[[Sequence[JudgedAnswer]], np.ndarray]:
    if judge.reward_model is not None:
        model = load_reward_model(judge.reward_model, mesh=build_mesh(config.mesh), dtype=judge.dtype)

        def by_model(answers: Sequence[JudgedAnswer]) -> np.ndarray:
            prompts, responses = [each.prompt for each in answers], [each.response for each in answers]
            return model.score(prompts, responses, kind=judge.kind, batch_size=config.compare.batch_size).sum

        return by_model
    scorer = FunctionScorer(str(judge.function), open_function(str(judge.function)))

    def by_function(answers: Sequence[JudgedAnswer]) -> np.ndarray:
        samples = [TextSample(each.prompt, _as_response(each.response), each.fields or {}) for each in answers]
        return np.asarray(scorer(samples))

    return by_function


def _as_response(text: str) -> Response:
    response = Response(text)
    response.raw, response.token_ids, response.ended = text, np.zeros(0, np.int32), True
    return response


def _both_orders(first: str, second: str) -> tuple[tuple[str, str], tuple[str, str]]:
    return (first, second), (second, first)


def identity_of_judge(judge: ComparisonJudgeConfig) -> str:
    """Hash of all that decides a judge's verdicts; of a function its file, but not what that imports."""
    decisive: list[Any] = [judge.function, judge.kind, judge.dtype]
    if judge.function is not None and not judge.function.startswith(tasks.PREFIX):
        decisive += [source_digest(open_function(judge.function))]
    for path in (judge.reward_model, judge.language_model):
        source = ModelSource(path=path)
        decisive += [] if path is None else [weights.identity_of_source(source), weights.contents_of(source)]
    if judge.endpoint is not None:
        endpoint = judge.endpoint
        decisive += [endpoint.model, endpoint.max_tokens, endpoint.temperature, endpoint.extra]
    if judge.words != ("A", "B"):  # else the question of a file, which need not have them, would decide alone
        decisive += judge.words
    return _digest(decisive)[:12]


def _check_task(name: str, function: str, prompts: Sequence[Sequence[Message]]) -> None:
    if not function.startswith(tasks.PREFIX):
        return
    for prompt in prompts:
        try:
            tasks.judge(function.removeprefix(tasks.PREFIX), prompt, "")
        except UserError as error:
            raise UserError(
                f"{option(f'judges.{name}.function')} is {function!r}, which cannot judge answers to "
                f"{transcript(prompt)[:60]!r}, no prompt of that task; compare on its prompts alone, e.g. "
                f"{flag('prompts.test.path')}={function} {flag('prompts.test.split')}=test"
            ) from error


@contextmanager
def named_judge(name: str, judge: ComparisonJudgeConfig) -> Iterator[None]:
    """Name what a judge's fields stand for in messages."""
    field = f"config.judges.{name}"
    model = f"{field}.{'reward_model' if judge.language_model is None else 'language_model'}"
    with naming({"path": model, "reward.function": f"{field}.function", "model.path": model, "kind": f"{field}.kind"}):
        yield


def _digest(content: Any) -> str:
    # A column of a record may be what JSON has not, e.g. a date.
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, default=repr).encode()).hexdigest()[:24]
