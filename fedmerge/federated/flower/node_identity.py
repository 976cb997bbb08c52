"""Which hospital a node is: the one whose site file its own node-config names. Only a simulated node plays whom it is told to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fedmerge.errors import ScenarioError, SiteError
from fedmerge.federated.client import site_log
from fedmerge.federated.flower.client import Said
from fedmerge.federated.messages import SiteTask
from fedmerge.federated.pool.experts import fingerprint
from fedmerge.federated.site import Site, public_bytes
from fedmerge.system.files import at_home
from fedmerge.system.yaml_loader import read_as

KEY = "site"
SIMULATED = "partition-id"
"""What Flower tells the nodes of its simulation, and nobody tells a real one that follows docs/deployment.md."""

TOLD = ("name", "scanner", "shifts", "attack", "validation", "samples")


@dataclass(frozen=True)
class OwnFile:
    """A node of a deployment: `--node-config 'site="/path/of/its/own/site.yaml"'`. Of its images only its own file counts."""

    def name(self, node: Said) -> str:
        """What the node calls itself where its site file cannot be read."""
        return Path(str(node.get(KEY, ""))).stem

    def site(self, said: Said, node: Said) -> Site:
        """The hospital's own site file; in a simulation the hospital that the node is to play."""
        if file := node.get(KEY):
            return _read(at_home(str(file)))
        if SIMULATED in node and KEY in said:
            return Site.model_validate_json(str(said[KEY]))
        wrong = "its SuperNode does not say which hospital it is; expected --node-config 'site=\"/path/of/its/site.yaml\"'"
        raise SiteError(wrong, wrong)

    def task(self, said: Said, node: Said) -> SiteTask:
        """What is asked, of the hospital as its own file has it, if both mean the same hospital and images."""
        try:
            asked = SiteTask.model_validate_json(str(said["task"]))
        except (KeyError, ValidationError) as error:
            told = f"found a task that it cannot read ({type(error).__name__}); expected one of its own version of fedmerge"
            raise SiteError(f"{told}: {error}", told) from None
        own = self.site({KEY: asked.site.model_dump_json()}, node)
        return agreed(asked, own) if node.get(KEY) else asked


def agreed(asked: SiteTask, own: Site) -> SiteTask:
    """The task with the hospital's own site; the expert then has the fingerprint that the coordinator expects. Raises SiteError."""
    there = asked.site
    differ = [name for name in TOLD if getattr(own, name) != getattr(there, name)]
    if _key(own) != _key(there):
        differ.append("public_key")
    here, wanted = own.source.classes(), asked.own or asked.classes
    if here != wanted and not (asked.model.reads_text and set(wanted) <= set(here)):
        differ.append("classes")
    if own.source.identity(own.name, asked.seed) != there.source.identity(there.name, asked.seed):
        differ.append("images")
    if (own.expert and own.expert.digest) != (there.expert and there.expert.digest):
        differ.append("expert")
    task = asked.model_copy(update={"site": own})
    if differ or fingerprint(task) != fingerprint(asked):
        what = ", ".join(differ) or "fingerprint"
        mend = f"Mend it with 'fedmerge outline --seed {asked.seed}'"
        told = f"its own site file and the coordinator's differ in: {what}; expected the same. {mend}"
        raise SiteError(f"site '{own.name}': {told}", told)
    return task


def _key(site: Site) -> bytes:
    return public_bytes(site.public_key) if site.public_key else b""


def _read(file: Path) -> Site:
    try:
        site = read_as(Site, file)
        if problems := site.source.check():
            raise ScenarioError(problems)
    except ScenarioError as error:
        site_log.tell_site_log(file.stem, error)
        raise SiteError(str(error), "its site file, or what that names, cannot be used; the hospital's own log says why") from None
    return site
