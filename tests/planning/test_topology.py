"""Names of topologies, and compilers that are missing."""

import importlib.util

import pytest

from jaxrm.errors import UserError
from jaxrm.planning.topology import open_topology


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5e", "v5e:4x4"),
        ("v99:2x2", "v5p:4x4x4"),
        ("cpu:3", "devices are open already"),
        ("cpu:0", "use one of"),
        ("cpu:8:2", "only TPUs have slices; e.g. --topology=cpu:8"),
        ("v5e:16x16:0", "use one of"),
        ("moon:2x2", "use one of"),
        ("h100:1x2x8", "h100:2x8"),
    ],
)
def test_an_unknown_topology_is_answered_with_what_there_is(name, words):
    with pytest.raises(UserError, match=words):
        open_topology(name)


@pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is not None, reason="a compiler for GPUs is here")
def test_a_missing_compiler_is_answered_with_what_to_install():
    with pytest.raises(UserError, match=r"pip install 'jax\[cuda13\]'"):
        open_topology("h100:8")
