"""A hospital's process: it answers one request, and nothing but the answer leaves it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedmerge.federated.client.diwa import Run
from fedmerge.federated.client.linear_probe import LinearProbe
from fedmerge.federated.client.round import train_round
from fedmerge.federated.client.site_log import kept_privately, tell_site_log
from fedmerge.federated.client.site_training import OnProgress, measure_site, model_of, train_run, train_site
from fedmerge.federated.messages import OnTick, Reply, Request, Tick
from fedmerge.federated.pool.experts import fingerprint
from fedmerge.federated.security.audit import Seal, Upload, state_digest
from fedmerge.federated.security.privacy import protect
from fedmerge.federated.security.signing import private_key, sign
from fedmerge.federated.security.statement import Statement, contents
from fedmerge.merging.bank.layout import Parts


def seal_of(request: Request, upload: Upload) -> Seal:
    """At the site: the statement of an upload, signed if the site's file has a public key. Raises SiteError without its key."""
    task = request.task
    asked = {**asked_of(request), "site": upload.site, "classes": upload.classes or task.classes}
    seal = Seal(Statement(**asked, **contents(upload)).text())
    return Seal(seal.text, sign(private_key(task.site), seal.signed_text))


def asked_of(request: Request) -> dict[str, Any]:
    """The part of a statement that follows from what was asked."""
    task = request.task
    return {
        "what": request.what,
        "layers": request.layers,
        "task": fingerprint(task),
        "initial": state_digest(request.weights),
        "classes": task.classes,
    }


def answer(request: Request, on_tick: OnTick, runs: Sequence[Run] | None = None) -> Reply:
    """All that leaves a site: an upload, or as a reason what it tells of an error; the error itself stays in the site's own log.

    Progress is told in hundredths: the number of steps would tell that of images. runs: those of a request to train, where they
    are done already.
    """
    began = time.perf_counter()
    site = request.task.site.name
    with kept_privately(site):
        try:
            private_key(request.task.site)  # a key that is missing is told before the site trains, not after
            upload: Upload | None = _upload(request, _in_hundredths(site, on_tick), runs)
            assert upload is not None
            reason, upload = "", replace(upload, seal=seal_of(request, upload))  # last: what is changed after this is refused
        except Exception as error:  # whatever it is, its text may hold what must not leave
            upload, reason = None, tell_site_log(site, error)
    return Reply(request.task, upload, reason, time.perf_counter() - began)


def one_run(request: Request, number: int, on_tick: OnTick) -> Run | str:
    """One run of a request to train, or what the site tells of the error that ended it."""
    site = request.task.site.name
    with kept_privately(site):
        try:
            private_key(request.task.site)
            return train_run(request.task, request.weights, number, _in_hundredths(site, on_tick))
        except Exception as error:
            return tell_site_log(site, error)


def _in_hundredths(site: str, on_tick: OnTick) -> OnProgress:
    return lambda done, total, text: on_tick(Tick(site, 100 * done // total, 100, text))


def _upload(request: Request, on_progress: OnProgress, runs: Sequence[Run] | None) -> Upload:
    match request.what:
        case "probe":
            return LinearProbe.at_site(request.task, request.weights)
        case "train":
            return _protected(request, train_site(request.task, request.weights, on_progress, runs))
        case "round":
            return train_round(request.task, request.weights, request.layers, on_progress)
        case kind:
            return measure_site(request.task, kind, request.weights, request.layers, on_progress)


def _protected(request: Request, upload: Upload) -> Upload:
    task = request.task
    if task.privacy is None:
        return upload
    return protect(upload, request.weights, Parts.of(model_of(task)), task.privacy, task.seed)
