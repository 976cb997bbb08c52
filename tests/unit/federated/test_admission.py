"""The gate: every bad upload of benchmarks/uploads.py is refused with a reason on record, and costs no other site its expert."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.errors import FolderError, SiteError, UploadRefused
from fedmerge.federated.client.site_log import own_log
from fedmerge.federated.client.worker import answer, seal_of
from fedmerge.federated.flower.decoding import array_of, reply_of
from fedmerge.federated.messages import Ask, Initial, Job, Reply, Request, SiteTask
from fedmerge.federated.pool.experts import ExpertPool, fingerprint
from fedmerge.federated.pool.statistics import StatisticPool
from fedmerge.federated.security.audit import Seal, Upload, state_digest
from fedmerge.federated.security.limits import DEFAULT, measured
from fedmerge.federated.security.signing import VARIABLE, make
from fedmerge.federated.server.authentication import Claim, introduced, judge
from fedmerge.federated.server.collect import collect
from fedmerge.federated.server.in_process import LocalBackend
from fedmerge.federated.statistics._base import STATISTICS

Hospital = Callable[..., SiteTask]
Jobs = Callable[..., Job]
FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "uploads.py"


def _table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bad_uploads", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # typer's, of click
        spec.loader.exec_module(module)
    return module


TABLE = _table()
NAMES = sorted(TABLE.misdeeds(Path("trap"), {}))


@pytest.fixture
def keyed(hospital: Hospital, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hospital:
    """Hospitals with keys of their own."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "keys"))

    def give(name: str, *uploads: str, **training: object) -> SiteTask:
        task = hospital(name, runs=1, epochs=1, **training)
        public = make(tmp_path / "keys" / f"{name}.pem", renew=False)
        asked = tuple(STATISTICS.load(kind)() for kind in uploads)
        return task.model_copy(update={"site": task.site.model_copy(update={"public_key": public}), "uploads": asked})

    return give


def lines(job: Job) -> list[dict[str, object]]:
    return [json.loads(line) for line in job.audit.read_text().splitlines()] if job.audit.exists() else []


def replies(*given: Reply) -> Ask:
    return lambda requests, deadline_s: iter(given)


@pytest.fixture(scope="module")
def trained() -> dict[str, Upload]:
    """One honest upload, trained once for all misdeeds."""
    return {}


def honest(task: SiteTask, job: Job, trained: dict[str, Upload]) -> Upload:
    if "upload" not in trained:
        trained["upload"] = answer(Request("train", task, job.initial.weights), lambda _: None).upload  # type: ignore[assignment]
    return replace(trained["upload"], site=task.site.name, weights=dict(trained["upload"].weights))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "ghost"])
def test_a_bad_upload_is_refused_and_a_good_one_kept(
    name: str, hospital: Hospital, keyed: Hospital, job: Jobs, trained: dict[str, Upload], tmp_path: Path
) -> None:
    """The coordinator's own path from the message on; the benchmark sends the same by Flower."""
    good = keyed("good")
    before = job(good)
    upload = honest(good, before, trained)
    request = Request("train", good, before.initial.weights)
    fine = Reply(good, replace(upload, seal=seal_of(request, upload)), "", 1.0)
    deed = TABLE.misdeeds(tmp_path / "trap", upload.weights)[name]
    bad = hospital(name, runs=1, epochs=1) if deed.keyless else keyed(name)
    asked, request = job(good, bad), Request("train", bad, before.initial.weights)
    other = {n: t + 1e-3 for n, t in upload.weights.items()}  # two sites never have the same bits
    sent = replace(upload, site=name, weights=other)
    sent = deed.upload(sent, bad) if deed.upload else sent
    sent = replace(sent, seal=seal_of(deed.request(request) if deed.request else request, sent))
    content = TABLE.packed(Reply(bad, replace(sent, weights=dict(sent.weights)), "", 1.0))
    if deed.content:
        deed.content(content)
    outcomes = collect(asked, replies(fine, reply_of(content, bad, 1.0)))
    assert outcomes["good"].trained
    assert not outcomes[name].trained
    assert deed.said in outcomes[name].reason
    assert "its upload was refused" in outcomes[name].reason
    assert "Traceback" not in outcomes[name].reason
    assert [ExpertPool(asked.pool).has(task) for task in asked.tasks] == [True, False]
    (refused,) = [line for line in lines(asked) if line["verdict"] == "refused"]
    assert refused["site"] == name
    assert deed.said in str(refused["reason"])
    assert not (tmp_path / "trap").exists()


def test_without_a_misdeed_it_is_admitted(keyed: Hospital, job: Jobs, trained: dict[str, Upload]) -> None:
    """The road of the test above, with nothing done to it."""
    task = keyed("good")
    asked = job(task)
    upload, request = honest(task, asked, trained), Request("train", task, asked.initial.weights)
    sent = replace(upload, seal=seal_of(request, upload))
    content = TABLE.packed(Reply(task, sent, "", 1.0))
    reply = reply_of(content, task, 1.0)
    assert not sent.weights  # neither side holds bytes and tensors of a model together
    assert not content["weights"]
    assert collect(asked, replies(reply))["good"].trained
    expert = ExpertPool(asked.pool).load(task)
    assert expert.signed
    assert [line["dtype"] for line in expert.audit if line["kind"] == "statement"] == ["signed"]


def test_weights_are_hashed_once_on_each_side(keyed: Hospital, job: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the client's answer to the loaded expert: by the client, on arrival, and when it is read from disk."""
    task, found = keyed("good", "gram"), Counter[str]()
    asked = job(task)
    initial = state_digest(asked.initial.weights)

    def counted(state: Mapping[str, torch.Tensor]) -> str:
        found[once := state_digest(state)] += 1
        return once

    for name, module in list(sys.modules.items()):
        if name.startswith("fedmerge.") and hasattr(module, "state_digest"):
            monkeypatch.setattr(module, "state_digest", counted)
    reply = answer(Request("train", task, asked.initial.weights), lambda _: None)
    arrived = pickle.loads(pickle.dumps(reply))
    assert collect(asked, replies(arrived))["good"].trained
    known = StatisticPool(ExpertPool(asked.pool), [task])
    expert = known.with_statistics(known.pool.load(task), task)
    assert found.pop(initial) == 2  # theta_0, by both sides: what the client was sent, and what it should have been sent
    assert found == {expert.sha256: 3, state_digest(expert.statistics["gram"]): 3}


def test_a_digest_that_was_computed_before_is_not_believed(trained: dict[str, Upload]) -> None:
    """Neither of a pickled upload nor of a changed copy."""
    upload = next(iter(trained.values()))
    honest_digest = upload.sha256
    assert "sha256" not in vars(pickle.loads(pickle.dumps(upload)))
    assert replace(upload, weights={name: tensor + 1 for name, tensor in upload.weights.items()}).sha256 != honest_digest


def test_a_second_reply_is_refused_and_the_first_kept(keyed: Hospital, job: Jobs, trained: dict[str, Upload]) -> None:
    task, stranger = keyed("north"), keyed("stranger")
    asked = job(task)
    upload, request = honest(task, asked, trained), Request("train", task, asked.initial.weights)
    once = Reply(task, replace(upload, seal=seal_of(request, upload)), "", 1.0)
    outcomes = collect(asked, replies(once, once, Reply(stranger, upload, "", 1.0)))
    assert outcomes["north"].trained
    assert set(outcomes) == {"north"}
    refused = [(line["site"], line["reason"]) for line in lines(asked) if line["verdict"] == "refused"]
    assert [site for site, _ in refused] == ["north", "stranger"]
    assert all("an answer to no question" in str(reason) for _, reason in refused)


def test_a_statement_cannot_be_left_out(hospital: Hospital, job: Jobs, trained: dict[str, Upload]) -> None:
    task = hospital("open", runs=1, epochs=1)
    asked = job(task)
    outcome = collect(asked, replies(Reply(task, replace(honest(task, asked, trained), seal=Seal()), "", 1.0)))["open"]
    assert "statement: found none that can be read" in outcome.reason


def test_a_missing_private_key_is_that_sites_error_before_it_trains(keyed: Hospital, job: Jobs, tmp_path: Path) -> None:
    task, ticks = keyed("north"), list[object]()
    (tmp_path / "keys" / "north.pem").unlink()
    reply = answer(Request("train", task, job(task).initial.weights), ticks.append)
    assert reply.upload is None
    assert "its private key cannot be read" in reply.reason
    assert "north.pem cannot be read" in own_log("north").read_text()  # where it should be is for the hospital alone
    assert VARIABLE in reply.reason
    assert not ticks


def test_statistics_are_signed_and_so_are_the_rounds(keyed: Hospital, job: Jobs) -> None:
    tasks = [keyed(name, "gram", "gram_rounds", "soup") for name in ("north", "south")]
    asked = job(*tasks)
    assert not any(outcome.reason for outcome in LocalBackend().gather(asked, lambda _: None).values())
    known = StatisticPool(ExpertPool(asked.pool), tasks)
    expert = known.with_statistics(known.pool.load(tasks[0]), tasks[0])
    assert set(expert.statistics) == {"gram", "gram_rounds", "soup"}
    other = tasks[1].site.public_key
    renewed = tasks[0].model_copy(update={"site": tasks[0].site.model_copy(update={"public_key": other})})
    assert fingerprint(renewed) == fingerprint(tasks[0])
    for load in (lambda: known.pool.load(renewed), lambda: known.with_statistics(expert, renewed)):
        with pytest.raises(FolderError, match="its signature is not by the key that the site's file has now"):
            load()


def test_a_stolen_statistic_is_refused(keyed: Hospital, job: Jobs) -> None:
    """One site's answer with another's numbers: the signature is of other digests."""
    north, south = keyed("north", "gram"), keyed("south", "gram")
    asked = job(north, south)

    def ask(requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        found = [answer(request, lambda _: None) for request in requests]
        assert found[0].upload and found[1].upload
        yield found[0]
        yield replace(found[1], upload=replace(found[1].upload, statistics=found[0].upload.statistics))

    assert "digests of the statistics" in collect(asked, ask)["south"].reason


def test_linear_probing_refuses_an_unsigned_head(keyed: Hospital, job: Jobs) -> None:
    from fedmerge.federated.server.collect import probe_head

    task = keyed("north")
    asked = job(task)
    assert (
        probe_head(asked, (lambda requests, _: (answer(request, lambda tick: None) for request in requests))).sha256
        != asked.initial.sha256
    )

    def ask(requests: Sequence[Request], deadline_s: float) -> Iterator[Reply]:
        for request in requests:
            reply = answer(request, lambda _: None)
            assert reply.upload
            yield replace(reply, upload=replace(reply.upload, seal=replace(reply.upload.seal, signature="")))

    with pytest.raises(UploadRefused, match="signature: found none"):
        probe_head(asked, ask)


def test_a_name_must_be_proven_where_there_is_a_key(keyed: Hospital, hospital: Hospital, job: Jobs) -> None:
    north, south, open_ward = keyed("north"), keyed("south"), hospital("open")
    asked = job(north, south, open_ward)

    def claim(node: int, by: SiteTask, name: str = "", nonce: str = "") -> Claim:
        said = introduced(by.site, nonce or str(node))
        return Claim.of(node, str(node), {"said": {**said, **({"site": name} if name else {})}})

    claims = [claim(1, south, "north"), claim(2, north), claim(3, south, nonce="another"), claim(4, open_ward)]
    found, doubts = judge([*claims, claim(5, south, "nobody"), Claim.of(6, "6", {})], asked.tasks, asked)
    assert found == {"north": 2, "open": 4}
    assert set(doubts) == {"south"}
    assert len([line for line in lines(asked) if line["verdict"] == "refused"]) == 4
    twice, why = judge([claim(1, open_ward), claim(2, open_ward)], asked.tasks, asked)
    assert not twice
    assert "2 clients have its name" in why["open"]


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_whatever_the_bytes_are_it_is_a_refusal(noise: bytes) -> None:
    array = TABLE.npy(torch.zeros(3).numpy())

    class Sent:
        dtype, shape, stype = "float32", (3,), "numpy.ndarray"
        data = array[: len(noise)] + noise

    if Sent.data[:10] + Sent.data[128:] != array[:10] + array[128:]:
        try:
            assert array_of(Sent, "x").shape == (3,)
        except UploadRefused:
            return
        assert len(Sent.data) == len(array)  # other numbers, but three of them


def test_every_array_survives_the_road() -> None:
    for tensor in (torch.zeros(()), torch.arange(3), torch.ones(2, 0), torch.rand(2, 3).half(), torch.tensor([True])):
        plain = tensor.numpy()

        class Sent:
            dtype, shape, stype = str(plain.dtype), plain.shape, "numpy.ndarray"
            data = TABLE.npy(plain)

        assert torch.equal(array_of(Sent, "x"), tensor)


def test_an_array_by_columns_arrives_by_rows() -> None:
    plain = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))

    class Sent:
        dtype, shape, stype = "float32", (2, 3), "numpy.ndarray"
        data = TABLE.npy(plain)

    assert array_of(Sent, "x").is_contiguous()
    assert torch.equal(array_of(Sent, "x"), torch.from_numpy(plain.copy()))


@pytest.mark.parametrize("sides", [(1 << 40,), (1 << 20, 1 << 20), (-1,), (-2, -3), (1 << 32, 1 << 32)])
def test_a_header_that_promises_more_than_there_is_costs_no_memory(sides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Declared beside as in the header, so that only the bytes can tell."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": sides})

    class Sent:
        dtype, shape, stype = "float32", sides, "numpy.ndarray"
        data = head.getvalue() + bytes(24)

    monkeypatch.setattr(np.lib.format, "read_array", lambda *_, **__: pytest.fail("numbers were read"))
    with pytest.raises(UploadRefused, match="site 'a': head: found 24 bytes of numbers"):
        array_of(Sent, "site 'a': head")


def test_limits_are_far_from_honest_training(initial: Initial, hospital: Hospital) -> None:
    """Training at the largest learning rate that DomainBed draws is not near any of them."""
    hard = {"lr": {"default": 3e-3, "draw": [3e-3]}}
    task = hospital("north", epochs=20, diversity=hard)
    upload = answer(Request("train", task, initial.weights), lambda _: None).upload
    assert upload
    assert DEFAULT.complaint(upload.weights, initial.weights, initial.heads) == ""
    drift, kinship = measured(upload.weights, initial.weights, set(initial.heads))
    assert drift < DEFAULT.drift / 5
    assert kinship > 3 * DEFAULT.kinship
    turned = {"steps": torch.tensor(4), "w": torch.ones(3)}
    assert "other integers" in DEFAULT.complaint(turned, {"steps": torch.tensor(3), "w": torch.ones(3)}, ())


def test_errors_of_a_site_are_the_users(keyed: Hospital, tmp_path: Path) -> None:
    from fedmerge.federated.security.signing import private_key

    site, file = keyed("north").site, tmp_path / "keys" / "north.pem"
    right = file.read_bytes()
    file.chmod(0o644)
    with pytest.raises(SiteError, match="others may read"):
        private_key(site)
    file.chmod(0o600)
    file.write_bytes(b"no key")
    with pytest.raises(SiteError, match="something else than an Ed25519 private key"):
        private_key(site)
    make(file, renew=True)
    with pytest.raises(SiteError, match="another key than 'public_key'"):
        private_key(site)
    file.write_bytes(right)
    assert private_key(site) is not None
