"""The eight CPU devices of every test as a topology."""

import pytest
from support.planning import EIGHT

from jaxrm.planning.topology import open_topology


@pytest.fixture(scope="module")
def here():
    return open_topology(EIGHT)
