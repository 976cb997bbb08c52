"""The hospitals' side of the Flower app, as `pyproject.toml` names it."""

from __future__ import annotations

from fedmerge.federated.flower.client import client_app
from fedmerge.federated.flower.node_identity import OwnFile

app = client_app(OwnFile())
