"""What hospitals send beside weights, by real Flower: keys stay at home, and statistics are those of the plain loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmerge.federated.flower.launcher import SimulationBackend
from fedmerge.federated.messages import Initial, Job, SiteTask
from fedmerge.federated.pool.experts import ExpertPool, fingerprint
from fedmerge.federated.server.collect import incomplete
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.federated.site import OwnExpert
from tests.unit.federated.test_admission import keyed as keyed
from tests.unit.federated.test_statistics import loaded, same
from tests.unit.federated.test_statistics import sites as sites

Hospital = Callable[..., SiteTask]
Jobs = Callable[..., Job]


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_by_flower_keys_never_travel_and_a_hospital_brings_its_expert(
    keyed: Hospital, hospital: Hospital, job: Jobs, initial: Initial, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five hospitals of one federation, as each takes the start of two processes that know torch."""
    monkeypatch.chdir(tmp_path)
    signs, forgets, unsigned = keyed("signs"), keyed("forgets"), hospital("unsigned", runs=1, epochs=1)
    (tmp_path / "keys" / "forgets.pem").unlink()
    own = {name: tensor + 0.001 if tensor.is_floating_point() else tensor for name, tensor in initial.weights.items()}
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in own.items()}}, "own.pth")
    torch.save({"state_dict": {"w": torch.ones(3)}}, "wrong.pth")

    def bring(name: str, file: str) -> SiteTask:
        task = hospital(name)
        return task.model_copy(
            update={"site": task.site.model_copy(update={"expert": OwnExpert(checkpoint=file).found_anywhere()})}
        )

    asked = job(signs, forgets, unsigned, bring("brings", "own.pth"), bring("wrong", "wrong.pth"))
    outcomes = SimulationBackend().gather(asked, lambda _: None)
    trained = {name for name, outcome in outcomes.items() if outcome.trained}
    assert trained == {"signs", "unsigned"}
    assert "its private key cannot be read" in outcomes["forgets"].reason
    pool = ExpertPool(asked.pool)
    assert [pool.load(task).signed for task in (signs, unsigned)] == [True, False]
    secret = (tmp_path / "keys" / "signs.pem").read_text().splitlines()[1]
    run = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert run
    assert not [path for path in run if secret.encode() in path.read_bytes() or b"PRIVATE KEY" in path.read_bytes()]
    assert not outcomes["brings"].reason
    assert "its expert does not fit the model" in outcomes["wrong"].reason
    assert "wrong.pth" not in outcomes["wrong"].reason  # names of files stay in the hospital's own log
    found = pool.load(asked.tasks[3])
    assert all(torch.equal(found.weights[name], own[name]) for name in own)
    assert found.runs == []


@pytest.mark.slow
@pytest.mark.usefixtures("shared_ray")
def test_by_flower_by_the_loop_and_asked_for_later_they_are_the_same(sites: tuple[SiteTask, ...], job: Jobs) -> None:
    here, there, later = job(*sites, folder="local"), job(*sites, folder="flower"), job(*sites, folder="later")
    LocalBackend().gather(here, lambda _: None)
    outcomes = SimulationBackend().gather(there, lambda _: None)
    assert not any(outcome.reason for outcome in outcomes.values())
    bare = tuple(task.model_copy(update={"uploads": ()}) for task in sites)
    assert [fingerprint(task) for task in bare] == [fingerprint(task) for task in sites]
    LocalBackend().gather(replace(later, tasks=bare), lambda _: None)
    assert [task.site.name for task in incomplete(later)] == ["north", "south"]
    outcomes = LocalBackend().gather(later, lambda _: None)
    assert not any(outcome.trained or outcome.reason for outcome in outcomes.values())
    assert not incomplete(later)
    for one, two, three in zip(loaded(here), loaded(there), loaded(later), strict=True):
        assert set(one.statistics) == {"fisher", "gram", "gram_rounds", "soup"}
        for kind, state in one.statistics.items():
            assert same(state, two.statistics[kind])
            assert same(state, three.statistics[kind])
        shown = {line["item"]: line["bytes"] for line in one.audit if line["kind"] == "gram"}
        assert shown["gram.head.weight"] == 16 * 16 * 4
    lines = [[json.loads(line) for line in j.audit.read_text().splitlines()] for j in (here, there, later)]
    sums = [sum(line["bytes"] for line in said if line["kind"] != "statement") for said in lines]  # one for each message
    assert sums[0] == sums[1] == sums[2]
