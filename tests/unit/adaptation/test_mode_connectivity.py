"""Losses between experts, in the target's own process, against a loop in this one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fedmerge.adaptation.mode_connectivity import landscapes
from fedmerge.adaptation.target_site import TargetSite
from fedmerge.adaptation.tasks import TargetTask
from fedmerge.data.images import to_batch
from tests.targets import base, experts


@pytest.mark.slow
def test_losses_between_experts_are_those_of_plain_models(target: Callable[..., TargetTask]) -> None:
    ticks: list[tuple[int, int]] = []
    found = landscapes(target(), experts(), base(), 1000, lambda done, total: ticks.append((done, total)))
    assert ticks == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [(one.pair, one.part) for one in found[:4]] == [
        (("north", "south"), "both"),
        (("north", "south"), "encoder"),
        (("north", "south"), "head"),
        (("north", "west"), "both"),
    ]
    site = TargetSite(target(), experts(), base())
    assert found[0].images == len(site.images) == 96
    x = to_batch(site.images.pixels, *site.normalization)
    y = torch.from_numpy(site.images.labels)
    model = site.bank.model
    north, south = (site.bank.state_dict(site.bank.theta[k].clone()) for k in (0, 1))
    for at, loss, wrong in zip(found[0].at, found[0].cross_entropy, found[0].error, strict=True):
        state = {name: at * north[name] + (1 - at) * south[name] for name in north}
        logits = torch.func.functional_call(model, state, x).detach().double()
        assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, y)), abs=1e-5)
        assert wrong == pytest.approx(float((logits.argmax(1) != y).double().mean()), abs=0.011)
    row = found[0].as_row()
    assert row["cross_entropy_barrier"] >= 0
    assert row["cross_entropy_barrier"] >= row["cross_entropy_barrier_mean_form"] - abs(
        found[0].cross_entropy[0] - found[0].cross_entropy[-1]
    )
