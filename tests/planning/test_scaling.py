"""Weak scaling on paper."""

import dataclasses

import pytest
from support.planning import config, with_memory

from jaxrm.data.config import DataConfig
from jaxrm.errors import UserError
from jaxrm.planning import scaling
from jaxrm.planning.compile import plan_stage
from jaxrm.sharding.mesh import MeshConfig


@pytest.mark.slow
def test_weak_scaling_gives_every_device_as_many_rows(here, capsys):
    parts = [
        dataclasses.replace(with_memory(here, 16.0), name=f"cpu:{count}", devices=here.devices[:count])
        for count in (2, 4, 8)
    ]
    one = dataclasses.replace(
        config(), mesh=MeshConfig(), data=DataConfig(path="task:safety", max_length=64, batch_size=4)
    )
    plans = scaling.weak_scaling(one, parts)
    assert [each.batch_size for each in plans] == [4, 8, 16]
    seconds = [each.programs[0].cost.compute_seconds for each in plans]
    sent = [each.programs[0].cost.collectives["all-reduce"] for each in plans]
    gradients = [size / (1 - 1 / count) for size, count in zip(sent, (2, 4, 8), strict=True)]
    assert gradients == pytest.approx([gradients[0]] * 3, rel=0.01)  # the gradients, on a ring of so many devices
    assert [each.programs[0].cost.flops for each in plans] == pytest.approx(
        [plans[0].programs[0].cost.flops * times for times in (1, 2, 4)]
    )
    assert seconds[0] is None  # no peak of a CPU is known
    scaling.print_scaling(plans)
    assert "cpu:8" in capsys.readouterr().out
    with pytest.raises(UserError, match="use multiples"):
        scaling.weak_scaling(one, [parts[1], parts[0]])


def test_a_bend_is_put_down_to_what_grew(here):
    plans = [plan_stage(config(), with_memory(here, 16.0))]
    cost = dataclasses.replace(plans[0].programs[0].cost, compute_seconds=1.0, memory_seconds=0.5, ici_seconds=0.1)
    steady = dataclasses.replace(plans[0], programs=(dataclasses.replace(plans[0].programs[0], cost=cost),))
    slower = dataclasses.replace(cost, memory_seconds=2.0, ici_seconds=0.2)
    bent = dataclasses.replace(
        steady, programs=(dataclasses.replace(steady.programs[0], cost=slower),), topology="more"
    )
    assert "does not bend" in scaling.bend([steady, steady])
    assert "bends at more: efficiency 50%" in scaling.bend([steady, bent])
    assert "memory takes 2 s there and 0.5 s on" in scaling.bend([steady, bent])
