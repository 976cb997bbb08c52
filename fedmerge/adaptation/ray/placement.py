"""Which machine of a cluster the target and its shards go to, and what is said where there is none for them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fedmerge.errors import Problem, ScenarioError

Nodes = list[dict[str, float]]
"""What every node that is alive declares, by resource."""

TARGET = "target"
"""The resource that a cluster's node declares if it is the target hospital's machine: it gets the target's actor."""

SHARD = "shard"
"""The resource that nodes declare which may hold experts for the target, and see its batches; one for each shard that they take."""


OF_RAY = ("CPU", "GPU", "memory", "object_store_memory")
"""Resources that Ray counts itself; by none of them a machine is told from others, and Ray refuses them as marks."""

LEAST_SHARE = 1e-4
"""Ray counts in ten thousandths."""


@dataclass(frozen=True)
class Placement:
    """What each actor asks Ray for. target: options of the target's actor. shard: of each shard's, or None to be at the target."""

    target: dict[str, Any]
    shard: dict[str, Any] | None


@dataclass(frozen=True)
class Wanted:
    """What a scenario asks of a cluster. gpus: of the target, None for one if there is one. resource: the target machine's, None
    for `target` where a node declares it. shards: processes for the experts. hospitals: whether anybody may have to train, and
    `each`, on what share of a GPU.
    """

    gpus: float | None = None
    resource: str | None = None
    shards: int = 1
    hospitals: bool = False
    each: float = 0.0

    def at(self, placement: Placement) -> Wanted:
        """The same with what was found for it, so that nothing else will do once the actor has been placed."""
        resource = next(iter(placement.target["resources"]), None)
        return replace(self, gpus=placement.target["num_gpus"], resource=resource)

    def place(self, nodes: Nodes) -> Placement:
        """Where everything goes. Raises ScenarioError, naming each resource with what is wanted and what there is."""
        self._refuse_what_ray_takes_nowhere()
        declared = any(node.get(TARGET, 0) > 0 for node in nodes)
        resource = self.resource or (TARGET if declared else None)
        homes = [node for node in nodes if resource is None or node.get(resource, 0) >= 1]
        most = max((node.get("GPU", 0) for node in homes), default=0)
        gpus = self.gpus if self.gpus is not None else float(most >= 1)
        problems = []
        if not homes:
            there = max((node.get(str(resource), 0) for node in nodes), default=0)
            mend = f"Start the target's node with ray start --resources='{{\"{resource}\": 1}}', or leave target.resource out"
            problems.append(_lacking("target.resource", str(resource), 1, there, "on a node", mend))
        elif most < gpus:
            on = f"on the target's node ('{resource}')" if resource else "on a node"
            problems.append(_lacking("target.gpus", "GPU", gpus, most, on, "Leave target.gpus out to run without"))
        spread = sum(int(node.get(SHARD, 0)) for node in nodes)
        if self.shards > 1 and 0 < spread < self.shards:
            mend = "Declare more on the nodes that may hold experts, or take fewer shards"
            problems.append(_lacking("target.shards", SHARD, self.shards, spread, "on all nodes together", mend))
        problems += self._of_hospitals(nodes) if self.hospitals else []
        if problems:
            raise ScenarioError(problems)
        own = {"num_cpus": 0, "num_gpus": gpus, "resources": {resource: 1} if resource else {}}
        apart = {"num_cpus": 0, "resources": {SHARD: 1}, "scheduling_strategy": "SPREAD"}
        return Placement(own, apart if spread else None)

    def _refuse_what_ray_takes_nowhere(self) -> None:
        """Raises ScenarioError: Ray itself would refuse it only when hospitals have trained."""
        problems = []
        if self.resource in OF_RAY:
            expected = "a name of your own that marks the target's machine, e.g. 'target'"
            problems.append(Problem("Ray", "target.resource", f"'{self.resource}', which every machine has", expected))
        for key, share in (("target.gpus", self.gpus or 0.0), ("FEDMERGE_HOSPITAL_GPUS", self.each)):
            if 0 < share < LEAST_SHARE or (share > 1 and share != int(share)):
                expected = f"nothing, a share from {LEAST_SHARE:g} to 1, or a whole number of GPUs"
                problems.append(Problem("Ray", key, f"{share:g}", expected))
        if problems:
            raise ScenarioError(problems)

    def _of_hospitals(self, nodes: Nodes) -> list[Problem]:
        wards = [node for node in nodes if node.get("CPU", 0) >= 1]
        if not wards:
            return [_lacking("sites", "CPU", 1, 0, "on a node", "Start a node with CPUs, on which hospitals train")]
        most = max(node.get("GPU", 0) for node in wards)
        if self.each <= most:
            return []
        return [_lacking("FEDMERGE_HOSPITAL_GPUS", "GPU", self.each, most, "on a node with CPUs", "Unset it to train on CPUs")]


def _lacking(key: str, resource: str, wanted: float, there: float, where: str, mend: str) -> Problem:
    return Problem("Ray", key, f"{there:g} of the resource '{resource}' {where}", f"{wanted:g}", mend)
