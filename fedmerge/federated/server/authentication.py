"""Which client is which hospital. A client says who it is; a hospital with a key proves it by signing the server's number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedmerge.errors import SiteError
from fedmerge.federated.client.site_log import tell_site_log
from fedmerge.federated.messages import Job, SiteTask
from fedmerge.federated.security.signing import private_key, sign, signed_by
from fedmerge.federated.server.admission import refuse
from fedmerge.federated.site import Site

PREFIX = "fedmerge introduction\n"


@dataclass(frozen=True)
class Claim:
    """What a client has said of itself. nonce: the number that it was sent. problem: why a hospital cannot sign, in its words."""

    node: int
    nonce: str
    site: str
    signature: str
    problem: str

    @staticmethod
    def of(node: int, nonce: str, content: Mapping[str, Any]) -> Claim:
        """The claim in a message; whatever is missing there is empty."""
        try:
            said = dict(content["said"])
        except (KeyError, TypeError, ValueError):
            said = {}
        words = [" ".join(str(said.get(key, "")).split())[:500] for key in ("site", "signature", "problem")]
        return Claim(node, nonce, *words)


def introduced(site: Site, nonce: str) -> dict[str, str]:
    """At the site: its name, and the signature of the server's number, or why there is none."""
    try:
        signature, problem = sign(private_key(site), _text(site.name, nonce)), ""
    except SiteError as error:
        signature, problem = "", tell_site_log(site.name, error)
    return {"site": site.name, "signature": signature, "problem": problem}


def judge(claims: Sequence[Claim], tasks: Sequence[SiteTask], job: Job) -> tuple[dict[str, int], dict[str, str]]:
    """The node of every site that is known, and for others why not. A claim that is not believed is a line of the audit.

    Without a key nobody can tell which of two clients with one name is the hospital, so neither is asked.
    """
    known = {task.site.name: task.site for task in tasks}
    found: dict[str, int] = {}
    doubts: dict[str, str] = {}
    for claim in claims:
        site = known.get(claim.site)
        rivals = [other for other in claims if other.site == claim.site]
        if site is None:
            _refuse(job, claim, "expected the name of a site that is asked")
        elif site.public_key and not signed_by(site.public_key, _text(site.name, claim.nonce), claim.signature):
            why = claim.problem or "its client has not signed with the key in its site file"
            doubts[site.name] = why
            _refuse(job, claim, why)
        elif not site.public_key and len(rivals) > 1:
            doubts[site.name] = f"{len(rivals)} clients have its name, and its site file has no key that would tell which is right"
            _refuse(job, claim, doubts[site.name])
        elif found.setdefault(site.name, claim.node) != claim.node:
            _refuse(job, claim, "it has introduced itself before")
    return found, {name: why for name, why in doubts.items() if name not in found}


def _refuse(job: Job, claim: Claim, why: str) -> None:
    refuse(job, claim.site or "?", f"a client says that it is '{claim.site}': {why}")


def _text(site: str, nonce: str) -> bytes:
    return f"{PREFIX}{site}\n{nonce}".encode()
