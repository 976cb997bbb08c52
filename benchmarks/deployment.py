"""A deployment of real Flower processes on loopback: what a real expert's size costs, and what happens when things break.

    python benchmarks/deployment.py size --out runs/deployment-size
    python benchmarks/deployment.py faults --out runs/deployment-faults

`size`: three hospitals train vit_base_patch32_224 (350 MB an expert) for one step on a few phantom images and upload it; seconds of
each phase, and the peak memory of each process. `faults`: a tiny model; a SuperNode and a client are killed, keys and certificates
do not fit, two nodes have one name, nobody is there. TLS and authentication are on in all of it. Nothing leaves this machine.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "deployment")]

from credentials import certificates, node_key  # noqa: E402 - after the path is set
from loopback import DeploymentError, Ended, Loopback, last_words  # noqa: E402
from watch import descendants  # noqa: E402

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
PLANES = {"north": ["axial"], "south": ["coronal"], "east": ["sagittal"], "mercy": ["axial", "coronal"]}
SITES = ["north", "south", "east"]
SCENARIO: dict[str, Any] = {
    "name": "deployed",
    "seed": 3,
    "model": {"name": "vit_tiny_patch16_224", "kwargs": TINY},
    "initialisation": {"kind": "proxy", "source": {"kind": "organ_phantom", "images": 60, "patients": 12}, "epochs": 1},
    "sites": SITES,
    "training": {"runs": 1, "epochs": 4, "optimiser": "adamw", "deadline_s": 400},
    "target": "mercy",
    "stream": {"kind": "mixture_drift", "batch_size": 8},
    "methods": ["mean"],
}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def world(root: Path, scenario: dict[str, Any], images: int = 80) -> Path:
    """A scenario and its sites on the disk; the scenario's file."""
    for folder in ("sites", "scenarios"):
        (root / folder).mkdir(parents=True)
    for name, planes in PLANES.items():
        source = {"kind": "organ_phantom", "images": images, "patients": images // 5, "planes": planes}
        (root / "sites" / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, "source": source}), encoding="utf-8")
    file = root / "scenarios" / f"{scenario['name']}.yaml"
    file.write_text(yaml.safe_dump(scenario, sort_keys=False), encoding="utf-8")
    return file


def experts(pool: Path) -> dict[str, str]:
    """sha256 of every expert's file, by the name of its entry: the site and the fingerprint."""
    found = sorted(pool.glob("experts/*/expert.safetensors"))
    return {file.parent.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


@contextmanager
def deployed(out: Path, scenario: Path, absent: tuple[str, ...] = ()) -> Iterator[Loopback]:
    """Everything started, but the SuperNodes of some."""
    with Loopback(out, scenario) as here:
        here.prepare()
        here.start_link()
        for site in SITES:
            if site not in absent:
                here.register(site)
                here.start_node(site)
        yield here


def until(true: Callable[[], bool], within_s: float, what: str) -> float:
    """Wait for something; the seconds that it took. Raises DeploymentError."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > within_s:
            raise DeploymentError(f"{what}: not within {within_s:g} s")
        time.sleep(0.1)
    return time.monotonic() - began


# --- faults ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What was broken, what came of it in one sentence, how long it took, and whether that is what it should be."""

    what: str
    found: str
    seconds: float
    right: bool


def training(here: Loopback, site: str) -> bool:
    """Whether a hospital has begun to train: it has drawn its images."""
    return any((here.hospital(site) / "cache" / site).glob("*.npz"))


def clients(here: Loopback, site: str) -> list[int]:
    """Processes of a hospital that train."""
    found = []
    for pid in descendants(here.started[site].pid):
        with suppress(OSError):
            if b"flwr-clientapp" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def broken(here: Loopback, site: str, strike: Callable[[], None]) -> Ended:
    """Run the federation, and strike while a hospital trains."""
    ended: list[Ended] = []
    runner = threading.Thread(target=lambda: ended.append(here.run()))
    runner.start()
    until(lambda: training(here, site), 120, f"{site} trains")
    strike()
    runner.join()
    return ended[0]


def node_killed(out: Path, scenario: Path, plain: dict[str, str]) -> Fault:
    """kill -9 of a SuperNode with all that it has started; then it is started again until the SuperLink lets it in."""
    with deployed(out, scenario) as here:
        tries = [0]

        def strike() -> None:
            here.kill("south")
            while True:
                tries[0] += 1
                node = here.start_node("south")
                with suppress(subprocess.TimeoutExpired):
                    node.wait(12)
                if node.poll() is None:
                    return

        ended = broken(here, "south", strike)
        asked = json.loads((here.out / "manifest.json").read_text())["asked_again"]
        same = experts(here.pool) == plain
        found = f"{ended.status}; started {tries[0]} times until let in; asked again: {asked}; same bits: {same}"
        return Fault("SuperNode and its client killed (SIGKILL) while it trains, then started again", found, ended.seconds, same)


def client_killed(out: Path, scenario: Path, plain: dict[str, str]) -> Fault:
    """kill -9 of the process that trains alone."""
    with deployed(out, scenario) as here:

        def strike() -> None:
            for pid in clients(here, "south"):
                os.kill(pid, signal.SIGKILL)

        ended = broken(here, "south", strike)
        asked = json.loads((here.out / "manifest.json").read_text())["asked_again"]
        same = experts(here.pool) == plain
        found = f"{ended.status}; asked again: {asked}; same bits: {same}"
        return Fault("Client alone killed (SIGKILL) while it trains", found, ended.seconds, same)


def unregistered(out: Path, scenario: Path, plain: dict[str, str]) -> Fault:
    """A hospital whose node key the coordinator has not registered; two of three are enough."""
    with deployed(out, scenario, absent=("south",)) as here:
        node = here.start_node("south")
        ended = here.run(**{"connect-s": 25})
        told = json.loads((here.out / "manifest.json").read_text())["absent"]
        words = last_line(here.hospital("south") / "south.log")
        kept = {name.split("-")[0] for name in experts(here.pool)}
        right = node.poll() not in (None, 0) and set(told) == {"south"} and kept == {"north", "east"}
        found = f"its SuperNode ends with {node.poll()}: “{words}”; {ended.status}; absent: {told}; kept: {sorted(kept)}"
        return Fault("Key not registered, `min_sites: 2` of 3", found, ended.seconds, right)


def wrong_certificate(out: Path, scenario: Path, plain: dict[str, str]) -> Fault:
    """A hospital that trusts another authority than the one that has signed the SuperLink's certificate."""
    with Loopback(out, scenario) as here:
        here.prepare()
        here.start_link()
        here.register("south")
        certificates(out / "other")
        return ends(here, "south", "Certificate by another authority", root_certificates=out.absolute() / "other" / "ca.crt")


def nobody_there(out: Path, scenario: Path, plain: dict[str, str]) -> Fault:
    """A SuperNode whose SuperLink is not there; it is told to try for 30 s."""
    with Loopback(out, scenario) as here:
        here.prepare()
        return ends(here, "south", "No SuperLink there (`--max-wait-time 30`)")


def ends(here: Loopback, site: str, what: str, **options: Any) -> Fault:
    """A SuperNode that should end by itself, with an error."""
    began, node = time.monotonic(), here.start_node(site, **options)
    with suppress(subprocess.TimeoutExpired):
        node.wait(90)
    words = last_line(here.hospital(site) / f"{site}.log")
    return Fault(what, f"its SuperNode ends with {node.poll()}: “{words}”", time.monotonic() - began, node.poll() not in (None, 0))


def same_node_key(out: Path, scenario: Path, plain: dict[str, str]) -> Fault:
    """The same SuperNode twice: same key, same hospital."""
    with deployed(out, scenario) as here:
        began = time.monotonic()
        until(lambda: "SuperNode ID" in last_words(here.hospital("south") / "south.log"), 60, "south connects")
        twin = here.start_node("south", name="twin")
        with suppress(subprocess.TimeoutExpired):
            twin.wait(60)
        words, seconds = last_line(here.hospital("south") / "twin.log"), time.monotonic() - began
        right = twin.poll() not in (None, 0) and here.started["south"].poll() is None
        return Fault("Two SuperNodes with one node key", f"the second ends with {twin.poll()}: “{words}”", seconds, right)


def one_name(out: Path, scenario: Path, plain: dict[str, str]) -> Fault:
    """A registered node that says it is another hospital, whose site key it does not have."""
    with deployed(out, scenario) as here:
        rogue = here.folder / "hospitals" / "rogue"
        rogue.mkdir()
        for name in ("south.yaml", "ca.crt"):
            shutil.copy(here.hospital("south") / name, rogue / name)
        node_key(rogue / "node.key")
        here.register("rogue")
        here.start_node("rogue", node_config=f'site="{rogue / "south.yaml"}"')
        until(lambda: "SuperNode ID" in last_words(rogue / "rogue.log"), 60, "the second node connects")
        ended = here.run()
        lines = [json.loads(line) for line in (here.out / "audit.jsonl").read_text().splitlines()]
        refused = [line["reason"] for line in lines if line["verdict"] == "refused"]
        same = experts(here.pool) == plain
        found = f"{ended.status}; refused: “{'; '.join(refused)[:160]}”; same bits from the right one: {same}"
        return Fault(
            "Two SuperNodes with one hospital's name, one without its site key", found, ended.seconds, same and bool(refused)
        )


def other_site_file(out: Path, scenario: Path, plain: dict[str, str]) -> Fault:
    """A hospital that has bought another scanner since it sent its outline; two of three are enough."""
    with deployed(out, scenario) as here:
        file = here.hospital("south") / "south.yaml"
        file.write_text(file.read_text(encoding="utf-8") + "scanner: {noise: 0.2}\n", encoding="utf-8")
        ended = here.run()
        told = json.loads((here.out / "manifest.json").read_text())["absent"]
        found = f"{ended.status}; absent: {told}"
        return Fault(
            "A site file changed since its outline, `min_sites: 2` of 3", found, ended.seconds, "scanner" in told.get("south", "")
        )


def no_hospital(out: Path, scenario: Path, plain: dict[str, str]) -> Fault:
    """Nobody connects."""
    with deployed(out, scenario, absent=tuple(SITES)) as here:
        ended = here.run(**{"connect-s": 15})
        right = ended.status == "finished:failed" and "no hospital has connected" in ended.said
        said = next((line for line in ended.said.splitlines() if line.startswith("fedmerge: ") and "connected" in line), "nothing")
        return Fault("No hospital connects", f"{ended.status}: “{said}”", ended.seconds, right)


def last_line(log: Path) -> str:
    """What a Flower process has said of why it ends."""
    said = last_words(log).rpartition("Exit Code:")[2].partition("For more information")[0]
    return " ".join(line.strip() for line in said.splitlines()[1:] if line.strip())[:200]


FAULTS = (
    node_killed,
    client_killed,
    unregistered,
    wrong_certificate,
    nobody_there,
    same_node_key,
    one_name,
    other_site_file,
    no_hospital,
)


@app.command()
def faults(
    out: Annotated[Path, typer.Option(help="a folder that is not there yet")] = Path("runs/deployment-faults"),
    only: Annotated[str, typer.Option(help="names of faults, separated by commas; default all")] = "",
) -> None:
    """Break a deployment in several ways, and print a table of what came of it."""
    long = {**SCENARIO, "training": {**SCENARIO["training"], "epochs": 400}}
    file = world(out / "world", long)
    enough = world(out / "enough", {**SCENARIO, "min_sites": 2, "training": {**SCENARIO["training"], "epochs": 2}})
    command = [sys.executable, "-m", "fedmerge.simulate", str(file), "--experts-only", "--pool", str(out / "pool")]
    subprocess.run([*command, "--out", str(out / "plain"), "--quiet"], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    plain, found = experts(out / "pool"), list[Fault]()
    for fault in FAULTS:
        if only and fault.__name__ not in only.split(","):
            continue
        try:
            one = fault(out / fault.__name__, enough if fault in (unregistered, other_site_file) else file, plain)
        except DeploymentError as error:
            one = Fault(fault.__name__, f"not measured: {error}", 0.0, False)
        found.append(one)
        typer.echo(f"| {one.what} | {one.found} | {one.seconds:.0f} s | {'yes' if one.right else 'NO'} |")
    raise typer.Exit(0 if all(one.right for one in found) else 1)


# --- size -----------------------------------------------------------------------------------------------------------------


@dataclass
class Peaks:
    """Most resident memory of each process while a federation runs, MiB, as the kernel counts it (VmHWM)."""

    of: dict[str, float] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def look(self, here: Loopback) -> None:
        """Until it is told to stop."""
        while not self.stop.wait(0.2):
            for name, process in list(here.started.items()):
                for pid in descendants(process.pid):
                    with suppress(OSError, ValueError, KeyError):
                        role = f"{name}: {kind(pid)}"
                        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
                        self.of[role] = max(self.of.get(role, 0.0), int(status["VmHWM"].split()[0]) / 1024)


def kind(pid: int) -> str:
    """What a process of a deployment is."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    names = [Path(word.decode(errors="replace")).name for word in words[:3]]
    return next((name for name in names if name.startswith(("flower-", "flwr-"))), "wrapper")


@app.command()
def size(
    out: Annotated[Path, typer.Option(help="a folder that is not there yet")] = Path("runs/deployment-size"),
    model: Annotated[str, typer.Option(help="any timm classifier")] = "vit_base_patch32_224",
    images: Annotated[int, typer.Option(help="of each hospital")] = 40,
) -> None:
    """One federation of three hospitals with a model of real size."""
    proxy = {"kind": "proxy", "source": {"kind": "organ_phantom", "images": 40, "patients": 8}, "epochs": 1}
    training = {"runs": 1, "epochs": 1, "max_steps": 1, "evaluations": 1, "optimiser": "adamw", "deadline_s": 900}
    file = world(out / "world", {**SCENARIO, "model": {"name": model}, "initialisation": proxy, "training": training}, images)
    began, peaks = time.monotonic(), Peaks()
    with deployed(out / "here", file) as here:
        started = time.monotonic() - began
        watcher = threading.Thread(target=peaks.look, args=(here,), daemon=True)
        watcher.start()
        ended = here.run()
        peaks.stop.set()
        watcher.join()
        manifest = json.loads((here.out / "manifest.json").read_text())
        entries = sorted(here.pool.glob("experts/*"))
        each = {entry.name.split("-")[0]: json.loads((entry / "manifest.json").read_text())["seconds"] for entry in entries}
        large = sum(file.stat().st_size for file in here.pool.glob("experts/*/expert.safetensors")) / max(1, len(entries)) / 1e6
    typer.echo(f"status {ended.status}; {len(entries)} experts of {large:.0f} MB; start of all processes {started:.1f} s")
    typer.echo(f"flwr run {ended.seconds:.1f} s, of which: {manifest['phases_seconds']}; upload admitted after (s): {each}")
    for role, mib in sorted(peaks.of.items()):
        typer.echo(f"| {role} | {mib:.0f} MiB |")


if __name__ == "__main__":
    app()
