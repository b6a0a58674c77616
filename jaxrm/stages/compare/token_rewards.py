"""Token rewards of some answers, for the page: what a reward model says of each token."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrm.inference.classifier import Classifier
from jaxrm.inference.load import load_reward_model
from jaxrm.runtime.row_log import RowLog
from jaxrm.sharding.mesh import build_mesh
from jaxrm.stage_config import Compare
from jaxrm.stages.compare.answers import AnswerKey, Answers
from jaxrm.stages.compare.judges import identity_of_judge, named_judge
from jaxrm.stages.compare.prompts import PromptSet

# ``tokens`` and ``rewards`` of an answer of a key and index.
TokenRewardRows = Mapping[tuple[AnswerKey, int], Mapping[str, Any]]


def score_tokens(config: Compare, folder: Path, sets: Mapping[str, PromptSet], answers: Answers) -> TokenRewardRows:
    """Token rewards of the first answers of each set, by the first judge that is a reward model, if any is."""
    names = [name for name, judge in config.judges.items() if judge.reward_model is not None]
    count = config.compare.token_rewards
    if not names or not count:
        return {}
    judge = config.judges[names[0]]
    log = RowLog(folder / "verdicts" / f"{names[0]}-{identity_of_judge(judge)}-tokens.jsonl")
    scored = {(row["prompt"], row["response"]): row for row in log.rows}
    wanted = {
        (key, index): (str(sets[key.prompts].prompts[index]), rows[index]["response"])
        for key, rows in answers.items()
        for index in range(min(count, len(rows)))
        if key.run == 0 and rows[index]["response"]
    }
    missing = {texts: sets[key.prompts].prompts[index] for (key, index), texts in wanted.items() if texts not in scored}
    if missing:
        with named_judge(names[0], judge):
            model = load_reward_model(str(judge.reward_model), mesh=build_mesh(config.mesh), dtype=judge.dtype)
            if isinstance(model, Classifier):
                return {}  # its number is of the whole answer
            scores = model.score(
                list(missing.values()),
                [response for _, response in missing],
                kind=judge.kind,
                batch_size=config.compare.batch_size,
            )
        new = [
            {"prompt": prompt, "response": response, "tokens": tokens, "rewards": [float(x) for x in rewards]}
            for (prompt, response), tokens, rewards in zip(missing, scores.tokens, scores.rewards, strict=True)
        ]
        log.append(new)
        scored |= {(row["prompt"], row["response"]): row for row in new}
    return {place: scored[texts] for place, texts in wanted.items()}
