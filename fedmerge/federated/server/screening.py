"""What the server does with the experts before the target gets them: look at all, leave out or repair what is odd, and say so.

No label is used. At most half of the experts are left out, and below three nobody is: from there on, nobody can tell who is odd.
Some checks look at public images: those of a proxy initialization, or those that a scenario names.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge.data.images import to_batch
from fedmerge.data.scanner import Scanner
from fedmerge.federated.defenses._base import FEWEST, Defense, Exhibit, Finding, Probe
from fedmerge.federated.model import ModelSpec, normalization
from fedmerge.federated.pool.experts import Expert
from fedmerge.federated.security.audit import Item, digest
from fedmerge.federated.server.initialization import PUBLIC, Checkpoint, Pretrained, Proxy
from fedmerge.rng import generator


@dataclass(frozen=True)
class Verdict:
    """What was done about one expert. what: "left out" or "repaired". why: the check's own words."""

    site: str
    check: str
    what: str
    why: str


@dataclass
class Vetting:
    """experts: those that go to the target. findings: every expert under every check, as last seen. remarks: what was not."""

    experts: list[Expert]
    findings: list[Finding] = field(default_factory=list)
    done: list[Verdict] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    forwards: int = 0
    seconds: float = 0.0

    @property
    def left_out(self) -> dict[str, str]:
        """The check that each site which was left out has failed."""
        return {one.site: one.check for one in self.done if one.what == "left out"}

    def as_record(self) -> dict[str, Any]:
        """For the run folder. forwards: of single images through one model."""
        findings = [{**asdict(finding), "odd": finding.odd} for finding in self.findings]
        for finding in findings:
            del finding["excess"]  # says no more than `odd`, and may be infinite, which JSON cannot say
        done = [asdict(one) for one in self.done]
        cost = {"forwards": self.forwards, "seconds": round(self.seconds, 3)}
        return {"findings": findings, "done": done, "left_out": self.left_out, "remarks": self.remarks, **cost}

    def audit(self) -> list[Item]:
        """A line for each thing that was done."""
        value = {(finding.site, finding.check): finding.value for finding in self.findings}
        lines = []
        for one in self.done:
            seen = torch.tensor(value[one.site, one.check], dtype=torch.float64)
            item = f"defense.{one.check}"
            lines.append(Item(one.site, item, "verdict", (), "float64", 0, digest(seen), "none", f"{one.what}: {one.why}"))
        return lines


def vet(
    experts: Sequence[Expert],
    theta_0: dict[str, Tensor] | None,
    model: nn.Module,
    defenses: Sequence[Defense],
    probe: Probe | None,
    on_tick: Callable[[int, int], None] = lambda done, total: None,
) -> Vetting:
    """Every check in its turn, the oddest expert first, until none is odd. model: any of the experts' kind. on_tick: how many
    times an expert has looked at the probe, of how many if none is repaired or left out."""
    began = time.perf_counter()
    vetting = Vetting(list(experts))
    checks = [defense for defense in defenses if not defense.at_target]
    if checks and len(experts) < FEWEST:
        names = ", ".join(defense.kind() for defense in checks)
        vetting.remarks.append(
            f"{names}: not applied to {len(experts)} experts; of fewer than {FEWEST} nobody can tell which one is odd"
        )
    elif checks:
        with torch.inference_mode():
            total = len(experts) * (1 + sum(defense.views for defense in checks))
            exhibit = Exhibit.of(model, theta_0, experts, probe, lambda done: on_tick(min(done, total), total))
            for defense in checks:
                exhibit = _under(defense, exhibit, vetting)
        vetting.experts = list(exhibit.experts)
        vetting.forwards = sum(exhibit.forwards)
    vetting.seconds = time.perf_counter() - began
    return vetting


def _under(defense: Defense, exhibit: Exhibit, vetting: Vetting) -> Exhibit:
    """One check, until nobody is odd or nobody can tell any more."""
    if defense.from_theta_0 and exhibit.theta_0 is None:
        vetting.remarks.append(f"{defense.kind()}: theta_0 is not known; not checked")
        return exhibit
    if defense.probe and exhibit.probe is None:
        vetting.remarks.append(f"{defense.kind()}: no public images (key 'probe'); not checked")
        return exhibit
    if defense.familiar and exhibit.probe is not None and not exhibit.probe.familiar:
        vetting.remarks.append(f"{defense.kind()}: the public images show other classes than the hospitals'; not checked")
        return exhibit
    seen: dict[str, Finding] = {}
    repaired: set[str] = set()
    while len(exhibit.experts) >= FEWEST:
        found = defense.judge(exhibit)
        seen |= {finding.site: finding for finding in found if finding.site not in repaired}
        worst = max((one for one in found if one.site not in repaired), key=lambda one: (one.odd, one.excess), default=None)
        if worst is None or not worst.odd:
            break
        if (mended := defense.repair(exhibit, worst.site)) is not None:
            exhibit = exhibit.mended(mended)
            repaired.add(worst.site)
            vetting.done.append(Verdict(worst.site, worst.check, "repaired", worst.said))
            continue
        if 2 * (len(vetting.left_out) + 1) > len(vetting.experts):
            vetting.remarks.append(f"{defense.kind()}: '{worst.site}' {worst.said}; half are left out already: it stays")
            break
        exhibit = exhibit.without(worst.site)
        vetting.done.append(Verdict(worst.site, worst.check, "left out", worst.said))
    else:
        vetting.remarks.append(f"{defense.kind()}: fewer than {FEWEST} experts are left; nobody can tell which one is odd")
    vetting.findings += seen.values()
    return exhibit


PROBES = 512
"""Public images that experts are compared on."""


def probe_of(
    initialization: Pretrained | Checkpoint | Proxy | None, named: Any, model: ModelSpec, classes: Sequence[str], seed: int
) -> Probe | None:
    """A draw of public images, or None if there are none. named: a source of the scenario's own. classes: the hospitals'.

    Raises DataError.
    """
    if named is not None:
        source, scanner = named, Scanner(noise=0.05)
    elif isinstance(initialization, Proxy):
        source, scanner = initialization.source, initialization.scanner
    else:
        return None
    raw = source.load(model.geometry, PUBLIC, seed)
    chosen = np.sort(generator(seed, "probe").permutation(len(raw))[:PROBES])
    images = scanner.scan(raw.subset(chosen), PUBLIC, seed)
    mean, std = normalization(model)

    def batch(pixels: np.ndarray) -> torch.Tensor:
        return to_batch(pixels, mean, std)

    return Probe(images.pixels, batch, familiar=set(classes) <= set(source.classes()))
