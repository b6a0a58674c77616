"""The kernels of a decoder: how it attends to whole rows and to a cache, and goes through its vocabulary."""

from dataclasses import dataclass, field

from jaxrm.models import attention, cached_attention
from jaxrm.ops import vocab


@dataclass(frozen=True)
class Kernels:
    """Functions that each platform has its own of; by default those of plain XLA, which run on any.

    Attributes:
      attend: to whole rows, see ``jaxrm.models.attention.choose``.
      read_cache: of tokens already read, see ``jaxrm.models.cached_attention.choose``.
      vocabulary: of log-probs, see ``jaxrm.ops.vocab_kernels.choose``.
    """

    attend: attention.Attend = attention.xla
    read_cache: cached_attention.Read = cached_attention.read_in_xla
    vocabulary: vocab.Chunks = field(default_factory=vocab.Chunks)


PLAIN = Kernels()
