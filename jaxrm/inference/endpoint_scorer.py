"""A judge behind a chat endpoint as a scorer of text: a rubric and one number for each response.

    python -m jaxrm.train --config=configs/ppo_tiny.py --config.reward.model=None --config.reward.kind=scalar \\
        --config.reward.endpoint.url=http://localhost:8000/v1 --config.reward.endpoint.model=my-judge

The rubric and the reading of answers are in `jaxrm.inference.rubric`, the calls in `jaxrm.inference.chat_endpoint`.
"""

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np

from jaxrm.algorithms.endpoint_config import EndpointConfig
from jaxrm.data.prompts import PromptExample
from jaxrm.errors import UserError, flag, option
from jaxrm.inference.chat_endpoint import ChatEndpoint, EndpointCost
from jaxrm.inference.rubric import Rubric, UnreadableScoreError
from jaxrm.inference.text_scorer import TextSample

_SHOWN = 60  # characters of a response that a message quotes


class EndpointScorer:
    """A judge as a `jaxrm.inference.text_scorer.TextScorer`.

    Args:
      config: of the endpoint.
      section: of the config, for messages.

    Raises:
      UserError: the rubric cannot be used, or the environment has no key.
    """

    is_collective = False

    def __init__(self, config: EndpointConfig, section: str = "reward.endpoint") -> None:
        self.name = f"{config.model} at {config.url}"
        self._config, self._endpoint, self._rubric = config, ChatEndpoint(config, section), Rubric(config, section)
        # As they are named where the source is opened.
        self._column_option, self._column_flag = option(f"{section}.reference"), flag(f"{section}.reference")

    @property
    def identity(self) -> str:
        """What decides its scores, so that a run is not judged by another midway; where it is does not."""
        config = self._config
        decisive = (config.model, self._rubric.template, config.answer, config.reference, config.unreadable)
        sent = (config.max_tokens, config.temperature, config.extra)
        return f"judge {config.model}, sha256 {hashlib.sha256(repr((decisive, sent)).encode()).hexdigest()[:12]}"

    @property
    def reference_column(self) -> str | None:
        """The column of a record that the rubric reads; None where it reads none."""
        return self._config.reference if self._rubric.needs_reference else None

    @property
    def cost(self) -> EndpointCost:
        """What was asked so far, and what it came to."""
        return self._endpoint.cost

    def check(self) -> None:
        """Refuse an endpoint that cannot be asked; see `ChatEndpoint.check`."""
        self._endpoint.check()

    def check_references(self, examples: Iterable[PromptExample]) -> None:
        """Refuse records without the reference that the rubric wants.

        Raises:
          UserError: naming the record.
        """
        column = self.reference_column
        if column is None:
            return
        for example in examples:
            if not _is_text(example.fields.get(column)):
                columns = ", ".join(example.fields) or "none"
                raise UserError(
                    f"{self._column_option} is {column!r}, which the rubric wants, but {example.source} has no "
                    f"such text; its other columns: {columns}; e.g. {self._column_flag}=answer"
                )

    def __call__(self, samples: Sequence[TextSample]) -> np.ndarray:
        """Scores ``[B]`` float32, on the scale of ``config.answer``.

        Raises:
          UserError: naming the sample that got no score.
        """
        column = self.reference_column
        questions = [
            self._rubric.question(
                sample.prompt, sample.response, None if column is None else str(sample.fields[column])
            )
            for sample in samples
        ]
        answers = self._endpoint.ask(
            questions,
            problem=self._problem,
            keep_unusable=self._config.unreadable is not None,
            name=lambda number: f"response {number} of the batch, {samples[number].response[:_SHOWN]!r}",
        )
        return np.array([self._score(answer) for answer in answers], np.float32)

    def _score(self, answer: str) -> float:
        if not answer:
            assert self._config.unreadable is not None, "an answer that cannot be used is an error"
            return self._config.unreadable
        return self._rubric.score(answer)

    def _problem(self, answer: str) -> str | None:
        try:
            self._rubric.score(answer)
        except UnreadableScoreError as error:
            return str(error)
        return None


def _is_text(value: object) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool) and str(value).strip() != ""
