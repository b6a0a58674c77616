"""How many inputs the fuzzing tests try: a few in the suite, as many as ``JAXRM_FUZZ`` says elsewhere.

    JAXRM_FUZZ=10000 pytest tests -k fuzz

A fuzzing test is named ``test_fuzz_…``. It feeds what hypothesis makes to the code that reads a user's file, and
accepts one of two ends: a value that the test can check, or a `jaxrm.errors.UserError` of one line.
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

NUM_EXAMPLES = int(os.environ.get("JAXRM_FUZZ", "30"))

# Derandomized, so that the suite gives the same answer twice; a longer search takes new inputs each time.
fuzz = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize="JAXRM_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)

# How a file is damaged: where it is cut off, as a share of its bytes, and which bytes are replaced by what.
_BYTES = st.one_of(st.sampled_from([0, 1, 0x7F, 0xFF, *b'{}[]":,-09ea']), st.integers(0, 255))
damages = st.tuples(
    st.one_of(st.just(1.0), st.floats(0, 1)),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), _BYTES), max_size=5),
)


def damaged(content: bytes, damage: tuple[float, list[tuple[float, int]]], places: int | None = None) -> bytes:
    """A file's content cut off, with bytes of its first ``places`` replaced."""
    share, replaced = damage
    changed = bytearray(content[: round(share * len(content))])
    for place, byte in replaced:
        if changed:
            changed[int(place * min(places or len(changed), len(changed)))] = byte
    return bytes(changed)
