"""The same step and the same sampling in torch and transformers, where both are installed; on CUDA, or on CPU."""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

from accelerator.report import LeftOutError, Report
from accelerator.shapes import SHAPES, Shape

from jaxrm.models.config import preset
from jaxrm.models.flops import mfu, training_flops_per_token


def train(shape: Shape, report: Report) -> None:
    """AdamW on float32 weights, computed in bfloat16, layers recomputed: as `training.sft` does."""
    torch, device = _open(shape)
    name = shape.models[0]
    report.doing(f"make {name}")
    model = _model(name, device, torch.float32)
    model.gradient_checkpointing_enable()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=device == "cuda")
    ids = torch.randint(model.config.vocab_size, (shape.rows, shape.length), device=device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    report.doing(f"steps of {name}")
    seconds = _best_seconds(torch, step, shape.rounds)
    tokens = shape.rows * shape.length
    flops = training_flops_per_token(preset(name), shape.length) * tokens
    share = mfu(flops, seconds, [_Named(torch)], "bfloat16") if device == "cuda" else None
    report.row(f"{name}, {shape.rows} × {shape.length} tokens", tokens / seconds, "tokens/s",
               beside=f"{seconds:.3g} s a step, {_versions(torch)}")  # fmt: skip
    if share is not None:
        report.row("MFU by hand count", share)
        report.row("peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")


def decode(shape: Shape, report: Report) -> None:
    """``model.generate`` in bfloat16: as `decoding.decode` does."""
    torch, device = _open(shape)
    sizes, name = shape.decoding, shape.models[0]
    report.doing(f"make {name}")
    model = _model(name, device, torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    ids = torch.randint(1, model.config.vocab_size, (sizes.rows, sizes.prompt), device=device)

    def run() -> None:
        with torch.no_grad():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=sizes.response,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
            )

    report.doing(f"responses of {name}")
    seconds = _best_seconds(torch, run, shape.rounds)
    report.row(f"{name}, {sizes.rows} × ({sizes.prompt} + {sizes.response}) tokens",
               sizes.rows * sizes.response / seconds, "tokens/s",
               beside=f"{seconds:.3g} s, {_versions(torch)}, model.generate")  # fmt: skip


class _Named:
    """A device of torch by the name that `jax.Device.device_kind` has too."""

    def __init__(self, torch: Any) -> None:
        self.device_kind = torch.cuda.get_device_name()


def _open(shape: Shape) -> tuple[Any, str]:
    """Torch, and the device that it uses."""
    lacking = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if lacking:
        raise LeftOutError(f"{' and '.join(lacking)} not installed")
    import torch

    if torch.cuda.is_available():
        return torch, "cuda"
    if shape == SHAPES["full"]:
        raise LeftOutError(f"torch {torch.__version__} sees no GPU, and this shape is too large for a CPU")
    return torch, "cpu"


def _model(name: str, device: str, dtype: Any) -> Any:
    """A model of random weights with the shape of a preset."""
    import torch
    import transformers

    from jaxrm.models.hub import to_hf_config

    config = transformers.AutoConfig.for_model(**to_hf_config(preset(name)))
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config).to(dtype)


def _best_seconds(torch: Any, run: Callable[[], None], rounds: int, most_seconds: float = 15.0) -> float:
    """As `here.best_seconds`."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 2 or (len(times) <= rounds and time.perf_counter() - begun < most_seconds):
        wait()
        start = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _versions(torch: Any) -> str:
    import transformers

    return f"torch {torch.__version__}, transformers {transformers.__version__}"
