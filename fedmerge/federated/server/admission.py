"""The server's gate: whether an upload is what was asked, whose it says, and sane. A refusal is a line of the audit."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedmerge.errors import UploadRefused
from fedmerge.federated.client.site_training import model_of
from fedmerge.federated.client.worker import asked_of
from fedmerge.federated.messages import Job, Reply, Request, SiteTask
from fedmerge.federated.model import ties_of
from fedmerge.federated.pool.experts import ExpertPool
from fedmerge.federated.security.audit import Declaration, DeclaredStatistic, Item, Seal, Upload, inspect, write_audit
from fedmerge.federated.security.signing import signed_by
from fedmerge.federated.security.statement import WORDS, Statement, contents, parsed, shown
from fedmerge.federated.statistics._base import Statistic
from fedmerge.merging.bank.layout import untied


def admit(reply: Reply, request: Request, declared: Declaration, job: Job, pool: ExpertPool | None = None) -> list[Item]:
    """Lines of the audit for all of an upload, written. Raises UploadRefused, with the refusal written.

    pool: the job's, where it is at hand, with what it has read of the experts that are there.
    """
    site = request.task.site.name
    try:
        if reply.upload is None:
            raise UploadRefused(reply.reason)
        pool = pool or ExpertPool(job.pool)
        items = [*_admitted(reply.upload, request, declared, job, pool), statement_item(site, reply.upload.seal)]
        if noised := request.task.privacy:
            items = [replace(item, verdict=f"admitted, {noised.said()}") for item in items]
        if request.what == "round":
            items = [replace(item, round=" ".join(request.layers)) for item in items]
    except UploadRefused as refusal:
        refuse(job, site, str(refusal), reply.upload)
        raise
    write_audit(job.audit, items)
    return items


def declared_statistics(task: SiteTask, asked: Sequence[Statistic]) -> dict[str, DeclaredStatistic]:
    """What a site may send of these statistics."""
    if not asked:
        return {}
    model = model_of(task)
    return {one.kind(): DeclaredStatistic(one.layout(model), one.refuses) for one in asked}


def refuse(job: Job, site: str, reason: str, upload: Upload | None = None) -> None:
    """A line of the audit for what was not let in."""
    size, sha256 = 0, ""
    if upload is not None:
        size, sha256 = upload.size, upload.sha256
    write_audit(job.audit, [Item(site, "upload", "upload", (), "", size, sha256, verdict="refused", reason=reason)])


def statement_item(site: str, seal: Seal) -> Item:
    """The audit's line for a statement and its signature: they leave the site, too."""
    content = seal.text.encode() + seal.signature.encode()
    kind = "signed" if seal.signature else "unsigned"
    return Item(site, "statement", "statement", (len(content),), kind, len(content), hashlib.sha256(content).hexdigest())


def _admitted(upload: Upload, request: Request, declared: Declaration, job: Job, pool: ExpertPool) -> list[Item]:
    task, site = request.task, request.task.site.name
    _signed(upload.seal, task.site.public_key, site)
    statement = parsed(upload.seal, site)
    asked = {**asked_of(request), "site": site}
    _compare(site, statement, asked, "found {here}; expected {there}")
    items = inspect(upload, declared)
    _compare(site, statement, contents(upload), "found {there}; declared {here}")
    kinds = {statistic.kind(): statistic for statistic in task.uploads}
    whole = [("", upload.weights), *((kind, state) for kind, state in upload.statistics.items() if kinds[kind].is_state)]
    theta_0, ties = job.initial.weights, ties_of(task.model)
    for kind, state in whole if request.what != "probe" else []:
        if wrong := "; ".join(untied(state, ties)):
            raise UploadRefused(f"site '{site}': {kind + ': ' if kind else ''}{wrong}")
        noised = task.privacy.complaint(state, theta_0) if task.privacy else None
        if noised is None:
            noised = job.limits.complaint(state, theta_0, job.initial.heads) if job.initial.known else ""
        if wrong := noised:
            raise UploadRefused(f"site '{site}': {kind + ': ' if kind else ''}{wrong}")
    if request.what == "train":
        _own(upload.sha256, site, job, pool)
    return items


def _signed(seal: Seal, public_key: str | None, site: str) -> None:
    """Raises UploadRefused unless whoever has the site's private key has signed; a site without a public key cannot be told."""
    if public_key is None:
        return
    if not seal.signature:
        raise UploadRefused(f"site '{site}': signature: found none; expected one by the key in its site file")
    if not signed_by(public_key, seal.signed_text, seal.signature):
        expected = "one by the key in its site file: another key has signed, or the statement was changed on its way"
        raise UploadRefused(f"site '{site}': signature: found one that is not valid; expected {expected}")


def _compare(site: str, statement: Statement, facts: dict[str, Any], form: str) -> None:
    for name in statement.differences(facts):
        here, there = getattr(statement, name), facts[name]
        if isinstance(here, dict):
            here, there = ({key: x.get(key) for key in {**here, **there} if here.get(key) != there.get(key)} for x in (here, there))
        raise UploadRefused(f"site '{site}': {WORDS[name]}: {form.format(here=shown(here), there=shown(there))}")


def _own(sha256: str, site: str, job: Job, pool: ExpertPool) -> None:
    """Raises UploadRefused if another site of the job has sent the same bits: one of the two has copied."""
    if twin := pool.twin(sha256, [task for task in job.tasks if task.site.name != site]):
        raise UploadRefused(f"site '{site}': weights: found those of site '{twin}', bit for bit; expected an expert of its own")
