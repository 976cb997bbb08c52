"""Break a deployment of real Flower processes on loopback, and print a table of what came of it.

    python benchmarks/deployment_faults.py --out runs/deployment-faults

A tiny model; a SuperNode and a client are killed, keys and certificates do not fit, two nodes have one name, nobody is there. TLS
and authentication are on in all of it. Nothing leaves this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from deployed import (
    ROOT,
    SCENARIO,
    SITES,
    DeploymentError,
    Ended,
    Loopback,
    deployed,
    descendants,
    experts,
    last_words,
    node_key,
    until,
    world,
)

from fedmerge.federated.security.certificates import issue


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


def recovered(here: Loopback, ended: Ended, what: str, found: str, plain: dict[str, str]) -> Fault:
    """Right if the experts have the bits that they have where nothing is broken."""
    asked = json.loads((here.out / "manifest.json").read_text())["asked_again"]
    same = experts(here.pool) == plain
    return Fault(what, f"{found}; asked again: {asked}; same bits: {same}", ended.seconds, same)


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
        what = "SuperNode and its client killed (SIGKILL) while it trains, then started again"
        return recovered(here, ended, what, f"{ended.status}; started {tries[0]} times until let in", plain)


def client_killed(out: Path, scenario: Path, plain: dict[str, str]) -> Fault:
    """kill -9 of the process that trains alone."""
    with deployed(out, scenario) as here:

        def strike() -> None:
            for pid in clients(here, "south"):
                os.kill(pid, signal.SIGKILL)

        ended = broken(here, "south", strike)
        return recovered(here, ended, "Client alone killed (SIGKILL) while it trains", ended.status, plain)


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
        issue(out / "other", "server", ["localhost", "127.0.0.1"])
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


def main(
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


if __name__ == "__main__":
    typer.run(main)
