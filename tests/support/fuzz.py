"""How many inputs the fuzzing tests try: a few in the suite, as many as ``JAXRM_FUZZ`` says elsewhere.

    JAXRM_FUZZ=10000 pytest tests -k fuzz

A fuzzing test is named ``test_fuzz_…``. It feeds what hypothesis makes to the code that reads a user's file, and
accepts one of two ends: a value that the test can check, or a `jaxrm.errors.UserError` of one line.
"""

import os

from hypothesis import HealthCheck, settings

NUM_EXAMPLES = int(os.environ.get("JAXRM_FUZZ", "30"))

# Derandomized, so that the suite gives the same answer twice; a longer search takes new inputs each time.
fuzz = settings(
    max_examples=NUM_EXAMPLES,
    deadline=None,
    derandomize="JAXRM_FUZZ" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)
