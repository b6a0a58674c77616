"""Which rows a process supplies. The mesh itself is tested with the training step."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxrm.errors import UserError
from jaxrm.sharding.mesh import AXES, batch_share


def mesh_of(shape, process_of_device):
    """Stands for a mesh over several processes; this test runs as process 0."""
    devices = np.empty(len(process_of_device), object)
    devices[:] = [SimpleNamespace(process_index=process) for process in process_of_device]
    return SimpleNamespace(devices=devices.reshape(shape), shape=dict(zip(AXES, shape, strict=True)))


@pytest.mark.parametrize(
    ("shape", "process_of_device", "share"),
    [
        ((1, 1, 1, 1), [0], (0, 1)),
        ((4, 1, 1, 1), [0, 0, 1, 1], (0, 2)),
        ((4, 1, 1, 1), [1, 1, 0, 0], (1, 2)),
        ((1, 4, 1, 1), [1, 0, 1, 0], (1, 2)),
        ((2, 2, 1, 2), [0, 0, 1, 1, 2, 2, 3, 3], (0, 4)),
        ((1, 1, 1, 4), [0, 0, 1, 1], (0, 1)),  # both processes supply the same rows
        ((1, 1, 4, 1), [0, 0, 1, 1], (0, 1)),
        ((1, 1, 2, 2), [0, 0, 1, 1], (0, 1)),
        ((2, 1, 2, 2), [1, 1, 2, 2, 0, 0, 3, 3], (1, 2)),
        ((2, 1, 1, 4), [1, 1, 2, 2, 0, 0, 3, 3], (1, 2)),
    ],
)
def test_processes_share_the_rows(shape, process_of_device, share):
    assert batch_share(mesh_of(shape, process_of_device)) == share


def test_uneven_shares_are_refused():
    with pytest.raises(UserError, match=r"config\.mesh\.tensor is 4.*unevenly.*--config\.mesh\.tensor=1"):
        batch_share(mesh_of((3, 1, 1, 4), [0] * 6 + [1] * 6))
    with pytest.raises(UserError, match=r"mesh\.context is 2 and config\.mesh\.tensor is 2, .*unevenly"):
        batch_share(mesh_of((3, 1, 2, 2), [0] * 6 + [1] * 6))
