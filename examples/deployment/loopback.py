"""A federation of real Flower processes on this machine: one SuperLink, one SuperNode a hospital, TLS and authentication on.

Each hospital has a folder of its own: its site file, its keys, its cache, its log. The coordinator has outlines of the site files
alone. Everything that was started ends with the context, and with this process, however that ends.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import yaml
from credentials import node_key

from fedmerge.cli.site_files import give_key, site_outline
from fedmerge.experiment.experiment import load_experiment, site_file
from fedmerge.federated.flower.processes import free_port
from fedmerge.federated.security.certificates import issue
from fedmerge.system.offline import sealed

ROOT = Path(__file__).resolve().parents[2]
START_S = 60.0
LIFELINE = (
    "import subprocess, sys; from fedmerge.system.process import end_with_parent; end_with_parent();"
    "sys.exit(subprocess.call(sys.argv[1:], stdin=subprocess.DEVNULL))"
)
"""Ends with us even after kill -9: its standard input is a pipe that only this process holds open."""


class DeploymentError(Exception):
    """A process of the deployment did not do what it should; the message has its last words."""


@dataclass(frozen=True)
class Ended:
    """How `flwr run` ended. status: Flower's, `finished:completed` if all went well. said: what the coordinator printed."""

    status: str
    details: str
    said: str
    seconds: float


@dataclass
class Loopback:
    """A scenario on real processes below `folder`. Use it as a context."""

    folder: Path
    scenario: Path
    port: int = 0
    started: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder = self.folder.absolute()
        self.coordinator, self.target = self.folder / "coordinator", self.folder / "target"
        self.pool, self.out = self.coordinator / "pool", self.coordinator / "run"
        self.port = self.port or free_port()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def hospital(self, site: str) -> Path:
        """The folder of a hospital."""
        return self.folder / "hospitals" / site

    def prepare(self) -> list[str]:
        """Lay out all folders; the names of the hospitals. In a real federation each does its own part on its own machine."""
        plan = load_experiment(self.scenario)
        content = yaml.safe_load(self.scenario.read_text(encoding="utf-8"))
        issue(self.coordinator / "tls", "server", ["localhost", "127.0.0.1"])
        for place in (self.coordinator, self.target):
            (place / "sites").mkdir(parents=True)
            (place / "scenarios").mkdir()
            (place / "scenarios" / self.scenario.name).write_text(self.scenario.read_text(encoding="utf-8"), encoding="utf-8")
        written = {Path(name).stem: name for name in _names(content)}
        for site in plan.sites:
            own = self.hospital(site.name) / f"{site.name}.yaml"
            own.parent.mkdir(parents=True)
            shutil.copy(site_file(written[site.name], self.scenario), own)
            if site.public_key is None:
                give_key(own, own.parent / "keys", renew=False)
            shutil.copy(self.coordinator / "tls" / "ca.crt", own.parent / "ca.crt")
            node_key(own.parent / "node.key")
            for place in (self.coordinator, self.target):
                (place / "sites" / own.name).write_text(site_outline(own, plan.scenario.seed), encoding="utf-8")
        target = site_file(written[plan.target.name], self.scenario)
        shutil.copy(target, self.target / "sites" / f"{plan.target.name}.yaml")
        told = site_outline(target, plan.scenario.seed)
        (self.coordinator / "sites" / f"{plan.target.name}.yaml").write_text(told, encoding="utf-8")
        return [site.name for site in plan.sites]

    def start_link(self) -> None:
        """The coordinator's SuperLink. Raises DeploymentError if it does not come up."""
        tls, home = self.coordinator / "tls", self.coordinator / "flwr"
        home.mkdir(exist_ok=True)
        connection = f'address = "127.0.0.1:{self.port}"\nroot-certificates = "{tls / "ca.crt"}"\n'
        (home / "config.toml").write_text(f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\n{connection}', "utf-8")
        options = ["--ssl-certfile", tls / "server.crt", "--ssl-keyfile", tls / "server.key", "--ssl-ca-certfile", tls / "ca.crt"]
        options += [
            "--host",
            "127.0.0.1",
            "--port",
            self.port,
            "--enable-supernode-auth",
            "--disable-runtime-dependency-installation",
        ]
        self.start("superlink", ["flower-superlink", *options], self.coordinator)
        self.wait_for_link()

    def wait_for_link(self, secure: bool = True) -> None:
        """Until the SuperLink answers. Raises DeploymentError if it does not."""
        began = time.monotonic()
        while not self._healthy(secure):
            if self.started["superlink"].poll() is not None or time.monotonic() - began > START_S:
                raise DeploymentError(f"the SuperLink did not start: {last_words(self.coordinator / 'superlink.log')}")
            time.sleep(0.2)

    def register(self, site: str) -> None:
        """Let the SuperNode with a hospital's key in."""
        done = self.flwr("supernode", "register", str(self.hospital(site) / "node.pub"), "loopback")
        if done.returncode:
            raise DeploymentError(f"{site}: its key was not registered: {done.stdout.strip()}")

    def start_node(self, site: str, name: str = "", **other: Any) -> subprocess.Popen[bytes]:
        """A hospital's SuperNode, in its own folder. other: options in place of its own, e.g. root_certificates."""
        here = self.hospital(site)
        options = {"superlink": f"127.0.0.1:{self.port}", "root_certificates": here / "ca.crt", "port": free_port()}
        options |= {"auth_supernode_private_key": here / "node.key", "max_wait_time": 30}
        options |= {"node_config": f'site="{here / f"{site}.yaml"}"'} | other
        words = [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        return self.start(name or site, ["flower-supernode", *words], here)

    def run(self, **config: Any) -> Ended:
        """`flwr run` of the hospitals' part of the scenario, to its end."""
        began = time.monotonic()
        places = {"root": self.coordinator, "scenario": f"scenarios/{self.scenario.name}", "pool": self.pool, "out": self.out}
        values = {name: str(value) for name, value in places.items()} | config
        file = self.coordinator / "run.toml"
        file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items()), encoding="utf-8")
        done = self.flwr("run", str(ROOT), "loopback", "--stream", "--run-config", str(file))
        found = re.search(r"started run (\d+)", done.stdout)
        if found is None:
            raise DeploymentError(f"flwr run: {done.stdout.strip()[-2000:]}")
        listed = self.flwr("list", "loopback", "--run-id", found.group(1), "--format", "json")
        told = json.loads(listed.stdout[listed.stdout.index("{") :])["runs"][0]
        return Ended(told["status"], told["status-details"], done.stdout, time.monotonic() - began)

    def flwr(self, *words: str) -> subprocess.CompletedProcess[str]:
        """One command of Flower's, as the coordinator."""
        with sealed():
            return subprocess.run(
                [_tool("flwr"), *words], env=self.environment(self.coordinator), cwd=self.coordinator, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def start(self, name: str, command: list[Any], folder: Path) -> subprocess.Popen[bytes]:
        """A process in a group of its own, in its own folder; what it says goes into `<folder>/<name>.log`."""
        words = [_tool(str(command[0])), *(str(word) for word in command[1:])]
        with sealed(), (folder / f"{name}.log").open("ab") as log:
            self.started[name] = subprocess.Popen(
                [sys.executable, "-c", LIFELINE, *words], cwd=folder, env=self.environment(folder),
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        return self.started[name]

    def kill(self, name: str) -> None:
        """kill -9 to a process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.started[name].pid, signal.SIGKILL)
        self.started[name].wait()

    def end(self) -> None:
        """End everything: SuperNodes say good-bye, then the SuperLink goes, and what it has put into sessions of their own."""
        detached = [pid for process in self.started.values() for pid in below(process.pid)]
        for names in ([name for name in self.started if name != "superlink"], ["superlink"]):
            running = [self.started[name] for name in names if name in self.started]
            for number, patience_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
                for process in running:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, number)
                for process in running:
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(patience_s)
        for pid in detached:
            with suppress(OSError):  # it has ended
                if f"FLWR_HOME={self.folder}/".encode() in Path(f"/proc/{pid}/environ").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    def _healthy(self, secure: bool) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
        if secure:
            context = ssl.create_default_context(cafile=self.coordinator / "tls" / "ca.crt")
            connection = http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def environment(self, folder: Path) -> dict[str, str]:
        """Nothing of another's folder: Flower's home, keys and cache are below the process's own."""
        own = {"FLWR_HOME": folder / "flwr", "FEDMERGE_KEYS": folder / "keys", "FEDMERGE_CACHE": folder / "cache"}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        code = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return {**os.environ, **{name: str(value) for name, value in own.items()}, "PATH": path, "PYTHONPATH": code}


def below(pid: int) -> list[int]:
    """Everything that a process has started, and that this has started."""
    table = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.splitlines()[1:]
    rows = [tuple(map(int, line.split())) for line in table]
    found = [pid]
    for one in found:
        found += [child for child, parent in rows if parent == one]
    return found[1:]


def last_words(log: Path) -> str:
    """The end of what a process has said."""
    return log.read_text(encoding="utf-8", errors="replace").strip()[-1500:]


def _tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _names(content: dict[str, Any]) -> list[str]:
    """Names of all sites that a scenario has, as it writes them."""
    target = content["target"]
    events = [event.get("join") or event.get("by") for event in content.get("events", [])]
    return [*content["sites"], *filter(None, events), target["site"] if isinstance(target, dict) else target]
