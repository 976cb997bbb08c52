"""The hospitals' side of the Flower app, as `pyproject.toml` names it."""

from __future__ import annotations

from fedmerge.deployment.identity import OwnFile
from fedmerge.experts.flower.client import client_app

app = client_app(OwnFile())
