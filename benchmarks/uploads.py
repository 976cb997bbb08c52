"""Every kind of bad upload that we could think of, each by a hospital of its own, beside an honest one, through real Flower.

    python benchmarks/uploads.py                    # about a minute on 2 cores; the table of docs/uploads.md
    python benchmarks/uploads.py --margins pool     # how far the experts of a pool are from the limits

A misdeed acts on the upload before the site signs it (a hospital that cheats), on the message after that (somebody on the way, or
a broken client), on the statement, or on the introduction. All hospitals have keys but `babble`. Exit status 1 if anything gets in.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))

import numpy as np  # noqa: E402 - after the environment of Ray and Flower is set
import torch  # noqa: E402
import typer  # noqa: E402
from torch import Tensor  # noqa: E402

from fedmerge.data.datasets.organ_phantom import ORGANS  # noqa: E402
from fedmerge.federated.client.worker import (  # noqa: E402
    answer,
    seal_of,
)
from fedmerge.federated.flower.client import packed  # noqa: E402
from fedmerge.federated.flower.simulation import run_flower  # noqa: E402
from fedmerge.federated.messages import (  # noqa: E402
    Backend,
    Initial,
    Job,
    Outcome,
    Request,
    SiteTask,
    Training,
)
from fedmerge.federated.model import ModelSpec, build  # noqa: E402
from fedmerge.federated.pool.experts import ExpertPool  # noqa: E402
from fedmerge.federated.security.audit import Upload  # noqa: E402
from fedmerge.federated.security.limits import measured, rms  # noqa: E402
from fedmerge.federated.security.signing import VARIABLE, make  # noqa: E402
from fedmerge.federated.server.authentication import introduced  # noqa: E402
from fedmerge.federated.server.in_process import LocalBackend  # noqa: E402
from fedmerge.federated.server.initialization import Proxy, initialize, kept_theta_0  # noqa: E402
from fedmerge.federated.site import Site  # noqa: E402
from fedmerge.merging.bank.layout import head_names  # noqa: E402

MODEL = ModelSpec(
    name="vit_tiny_patch16_224",
    kwargs={"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1},
)
SOURCE = {"kind": "organ_phantom", "images": 60, "patients": 12}
NAME, BIAS = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias"
State = dict[str, Tensor]


@dataclass(frozen=True)
class Misdeed:
    """What is tried, in words; what the refusal must say; and what is changed where. keyless: the site has no key."""

    tried: str
    said: str
    upload: Callable[[Upload, SiteTask], Upload] | None = None
    request: Callable[[Request], Request] | None = None
    content: Callable[[Any], None] | None = None
    says: str = ""
    keyless: bool = False


def weights(change: Callable[[State], State]) -> Callable[[Upload, SiteTask], Upload]:
    return lambda upload, task: replace(upload, weights=change(dict(upload.weights)))


def scalars(**changes: float) -> Callable[[Upload, SiteTask], Upload]:
    return lambda upload, task: replace(upload, scalars={**upload.scalars, **changes})


def elsewhere(upload: Upload, task: SiteTask) -> Upload:
    """The honest update on top of a random initialization of another seed, under the right head."""
    fresh = build(task.model, len(task.classes), seed=4711).state_dict()
    return replace(upload, weights={n: t if n.startswith("head") else fresh[n] for n, t in upload.weights.items()})


def data(change: Callable[[Any], Any], name: str = NAME, record: str = "weights") -> Callable[[Any], None]:
    """One array of the message with other bytes, shape or type."""

    def act(content: Any) -> None:
        from flwr.app import Array

        array = content[record][name]
        fields = {"dtype": array.dtype, "shape": array.shape, "stype": array.stype, "data": array.data} | change(array)
        content[record][name] = Array(**fields)

    return act


def npy(array: Any, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


def archive(array: Any) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, zeros=np.zeros(1 << 20, np.float32))
    return file.getvalue()


class Trap:
    """Unpickling this makes a file: had anybody unpickled it, the test would see it."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (self.file, "w"))


def said(**changes: Any) -> Callable[[Any], None]:
    return lambda content: content["said"].update(changes)


def forged(content: Any) -> None:
    """A signature of the right text by another key."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    text = b"fedmerge upload\n" + str(content["said"]["statement"]).encode()
    content["said"]["signature"] = base64.b64encode(Ed25519PrivateKey.generate().sign(text)).decode()


def scaled(factor: float) -> Callable[[Upload, SiteTask], Upload]:
    return weights(lambda w: {n: t * factor if not n.startswith("head") else t for n, t in w.items()})


def misdeeds(trap: Path, stolen: State) -> dict[str, Misdeed]:
    """By the name of the site that does it. trap: a file that is there afterwards if anybody has unpickled anything."""
    pickled = pickle.dumps(Trap(str(trap)))
    objects = npy(np.array([[Trap(str(trap))]], dtype=object), allow_pickle=True)
    one = lambda value: weights(lambda w: {**w, BIAS: w[BIAS].index_fill(0, torch.tensor([0]), value)})  # noqa: E731
    return {
        "renamed": Misdeed("an array under another name", "undeclared ['head.w']", weights(lambda w: {"head.w": w.pop(BIAS), **w})),
        "extra": Misdeed("one more array", "undeclared ['patients']", weights(lambda w: {**w, "patients": torch.zeros(9)})),
        "short": Misdeed(
            "an array is missing", f"missing ['{BIAS}']", weights(lambda w: {n: t for n, t in w.items() if n != BIAS})
        ),
        "shape": Misdeed("another shape", f"shape of {NAME}", weights(lambda w: {**w, NAME: w[NAME].T.contiguous()})),
        "dtype": Misdeed("another dtype", f"dtype of {NAME}", weights(lambda w: {**w, NAME: w[NAME].double()})),
        "nan": Misdeed("a NaN", f"{BIAS}: found NaN", one(torch.nan)),
        "inf": Misdeed("an infinity", f"{BIAS}: found NaN or infinity", one(torch.inf)),
        "huge": Misdeed("one absurd number (1e30)", f"{BIAS}: found root mean square", one(1e30)),
        "boosted": Misdeed("an encoder 50 times too large", "found root mean square", scaled(50)),
        "drifted": Misdeed("an encoder 8 times too large", "norms of theta_0 away", scaled(8)),
        "negated": Misdeed("an encoder with its sign turned", "trained from another initialization", scaled(-1)),
        "stranger": Misdeed("an expert of another initialization", "trained from another initialization", elsewhere),
        "elsewhere": Misdeed(
            "another initialization, and it says so",
            "initialization: found",
            request=lambda r: replace(r, weights={n: t + 1 for n, t in r.weights.items()}),
        ),
        "order": Misdeed("classes in another order", "classes: found", lambda u, t: replace(u, classes=tuple(reversed(u.classes)))),
        "classes": Misdeed("one class less", "classes: found", lambda u, t: replace(u, classes=u.classes[1:])),
        "count": Misdeed("0 training images", "scalar n: found 0", scalars(n=0.0)),
        "crowd": Misdeed("1e12 training images, to weigh more", "scalar n: found 1e+12", scalars(n=1e12)),
        "perfect": Misdeed("a validation accuracy of 1.5", "found 1.5; expected 0 to 1", scalars(validation_accuracy=1.5)),
        "album": Misdeed(
            "images that its file does not grant",
            "number of sample images",
            lambda u, t: replace(u, samples=torch.zeros(2, 16, 16, 1, dtype=torch.uint8)),
        ),
        "cut": Misdeed("an array that is cut off", "cut off", content=data(lambda a: {"data": a.data[:-64]})),
        "empty": Misdeed("an array of no bytes", "no array", content=data(lambda a: {"data": b""})),
        "more": Misdeed("bytes after the array", "more than it declares", content=data(lambda a: {"data": a.data + b"patient 7"})),
        "lies": Misdeed(
            "another shape in the bytes than beside", "declared", content=data(lambda a: {"data": npy(np.zeros(3, "f4"))})
        ),
        "pickle": Misdeed("a pickle in place of an array", "no array (pickle", content=data(lambda a: {"data": pickled})),
        "object": Misdeed("an array of objects", "only pickle could read", content=data(lambda a: {"data": objects})),
        "bomb": Misdeed("a compressed archive (4 MB of zeros)", "no array", content=data(lambda a: {"data": archive(a)})),
        "complex": Misdeed("complex numbers", "expected plain numbers", content=data(lambda a: {"data": npy(np.zeros(3, "c8"))})),
        "parcel": Misdeed("one more record", "undeclared parts ['notes']", content=lambda c: c.__setitem__("notes", c["scalars"])),
        "mute": Misdeed("no numbers at all", "missing ['scalars']", content=lambda c: c.__delitem__("scalars")),
        "changed": Misdeed(
            "a weight that is changed on the way",
            "digest of the weights",
            content=data(lambda a: {"data": a.data[:-1] + bytes([a.data[-1] ^ 1])}),
        ),
        "accounts": Misdeed("a number that is changed on the way", "numbers: found", content=lambda c: c["scalars"].update(n=99.0)),
        "unsigned": Misdeed("no signature", "signature: found none", content=said(signature="")),
        "forger": Misdeed("a signature by another key", "signature: found one that is not valid", content=forged),
        "rewritten": Misdeed(
            "a statement that is changed after it was signed",
            "signature: found one that is not valid",
            content=lambda c: c["said"].update(statement=str(c["said"]["statement"]).replace('"samples":""', '"samples":" "')),
        ),
        "babble": Misdeed("a statement that is none", "statement: found none", content=said(statement="{"), keyless=True),
        "replay": Misdeed(
            "an upload for another task",
            "task: found",
            request=lambda r: replace(r, task=r.task.model_copy(update={"seed": 1})),
        ),
        "impostor": Misdeed(
            "the name of another hospital in the statement", "site: found honest", lambda u, t: replace(u, site="honest")
        ),
        "ghost": Misdeed(
            "the name of another hospital, at the introduction", "has not signed with the key in its site file", says="upright"
        ),
        "twin": Misdeed("the expert of another hospital, bit for bit", "bit for bit", lambda u, t: replace(u, weights=stolen)),
    }


def tampering(tasks: Sequence[SiteTask], bad: dict[str, Misdeed]) -> Any:
    """The hospitals' side, where every site in `bad` does its misdeed. It travels to Ray's workers as it is."""
    from flwr.app import ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    @app.query()
    def introduce(message: Message, context: Context) -> Message:
        site = tasks[int(context.node_config["partition-id"])].site
        answered = introduced(site, str(message.content["ask"]["nonce"]))
        if site.name in bad and bad[site.name].says:
            answered["site"] = bad[site.name].says
        return Message(RecordDict({"said": ConfigRecord(answered)}), reply_to=message)

    @app.train()
    def work(message: Message, context: Context) -> Message:
        task = tasks[int(context.node_config["partition-id"])]
        request = Request("train", task, dict(message.content["weights"].to_torch_state_dict()))
        reply = answer(request, lambda _: None)
        deed = bad.get(task.site.name)
        if deed and reply.upload and (deed.upload or deed.request):
            upload = deed.upload(reply.upload, task) if deed.upload else reply.upload
            told = deed.request(request) if deed.request else request
            reply = replace(reply, upload=replace(upload, seal=seal_of(told, upload)))
        content = packed(reply)
        if deed and deed.content:
            deed.content(content)
        return Message(content, reply_to=message)

    return app


def hospital(name: str, initial: Initial, keys: Path, keyless: bool) -> SiteTask:
    """A tiny hospital of the phantom, with a key of its own."""
    public = None if keyless else make(keys / f"{name}.pem", renew=False)
    training = {"runs": 1, "epochs": 1, "evaluations": 1, "augment": "none", "diversity": {"lr": {"default": 1e-3, "draw": [1e-3]}}}
    return SiteTask(
        site=Site.model_validate({"name": name, "source": SOURCE, "public_key": public}),
        model=MODEL,
        training=Training.model_validate(training),
        classes=ORGANS,
        seed=0,
        initial_sha256=initial.sha256,
        head_init=initial.head_init,
    )


def tried(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Outcome], Job]:
    """One federation of all misdeeds and an honest hospital: what became of each."""
    proxy = Proxy.model_validate({"kind": "proxy", "source": SOURCE, "epochs": 1})
    initial = initialize(proxy, MODEL, len(ORGANS), 0, folder / "pool", lambda *_: None)
    os.environ[VARIABLE] = str(folder / "keys")
    honest = hospital("honest", initial, folder / "keys", keyless=False)
    job = Job((honest,), initial, folder / "pool", folder / "audit.jsonl", 300)
    LocalBackend().gather(job, lambda _: None)
    bad = misdeeds(folder / "trap", ExpertPool(job.pool).load(honest).weights)
    tasks = [hospital(name, initial, folder / "keys", deed.keyless) for name, deed in bad.items()]
    asked = [*tasks, hospital("upright", initial, folder / "keys", keyless=False)]
    job = replace(job, tasks=(honest, *asked))
    outcomes: dict[str, Outcome] = {}

    def program(backend: Backend) -> None:
        outcomes.update(backend.gather(job, lambda _: None))

    run_flower(job, asked, tampering(asked, bad), program)
    lines = [json.loads(line) for line in job.audit.read_text(encoding="utf-8").splitlines()]
    noted = {line["site"]: line["reason"] for line in lines if line["verdict"] == "refused"}
    rows = [
        {
            "site": task.site.name,
            "tried": bad[task.site.name].tried,
            "refused": bool(outcomes[task.site.name].reason) and not ExpertPool(job.pool).has(task),
            "said": noted.get(bad[task.site.name].says or task.site.name, ""),
            "expected": bad[task.site.name].said,
        }
        for task in tasks
    ]
    return rows, outcomes, job


def margins(pool: Path) -> None:
    """How far the experts of a pool are from the limits, and how far an unrelated random initialization is."""
    for manifest in sorted(pool.glob("experts/*/manifest.json")):
        task = SiteTask.model_validate(json.loads(manifest.read_text(encoding="utf-8"))["task"])
        weights, theta_0 = ExpertPool(pool).load(task).weights, kept_theta_0(task.initial_sha256, pool)
        if theta_0 is None:
            continue
        model = build(task.model, len(task.classes), seed=4711)
        heads, whole = set(head_names(model)), rms(t for t in theta_0.values() if t.is_floating_point())
        floats = [name for name, tensor in weights.items() if tensor.is_floating_point()]
        growth = max(rms([weights[name]]) / max(rms([theta_0[name]]), whole) for name in floats)
        drift, kinship = measured(weights, theta_0, heads)
        apart, cosine = measured(model.state_dict(), theta_0, heads)
        print(f"{task.site.name}, seed {task.seed}: growth {growth:.2f}, drift {drift:.2f}, kinship {kinship:.2f}", end="; ")
        print(f"unrelated: drift {apart:.2f}, kinship {cosine:+.3f}")


def main(
    page: Annotated[Path | None, typer.Option(help="write the table here, too, as Markdown")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="write what happened here")] = None,
    margin: Annotated[
        Path | None, typer.Option("--margins", help="a pool: only say how far its experts are from the limits")
    ] = None,
) -> None:
    """Try all, print the table."""
    if margin:
        margins(margin)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fedmerge-") as name:
        folder = Path(name)
        rows, outcomes, job = tried(folder)
        trapped = (folder / "trap").exists()
        there = sorted(path.name.rpartition("-")[0] for path in (job.pool / "experts").iterdir() if not path.name.startswith("."))
    table = ["| tried | refused | the audit's line |", "|---|---|---|"]
    table += [f"| {row['tried']} | {'yes' if row['refused'] else 'NO'} | {row['said']} |" for row in rows]
    print("\n".join(table))
    print(f"\n{sum(row['refused'] for row in rows)} of {len(rows)} refused; in the pool: {', '.join(there)}; pickle run: {trapped}")
    if page:
        page.write_text("\n".join(table) + "\n", encoding="utf-8")
    if as_json:
        reasons = {name: outcome.reason for name, outcome in outcomes.items()}
        as_json.write_text(json.dumps({"rows": rows, "outcomes": reasons, "kept": there, "trapped": trapped}), encoding="utf-8")
    if trapped or there != ["honest", "upright"] or not all(row["refused"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
