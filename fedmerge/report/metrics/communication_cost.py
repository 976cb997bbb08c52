"""What a row of the table has cost each hospital: rounds of messages, local steps, and bytes up and down."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedmerge.report.records import RunRecord

WITH_EVERY_EXPERT = frozenset({"weights", "scalar"})
"""Kinds of items that every method needs; of statistics, each counts for the methods that need it."""


def costs(record: RunRecord) -> dict[str, dict[str, Any]]:
    """By row: rounds, and means over hospitals of local steps, bytes up and bytes down. Empty without federated competitors.

    A merge, an ensemble or a single expert costs one round: theta_0 down once, an expert and what the method needs beside it up
    once, and the steps of all runs of the hospital's own training. Rounds in which
    statistics are asked for are not counted.
    """
    federated = record.manifest.get("federated", {})
    if not federated:
        return {}
    own, steps = record.manifest["one_shot"], record.manifest["one_shot"]["steps"]
    found = {}
    for name, info in record.methods.items():
        if name in federated:
            sites = list(federated[name]["sites"].values())
            hospitals = federated[name]["hospitals"]  # those that a fraction never draws cost nothing, and count
            mean = {key: float(sum(site[key] for site in sites)) / hospitals for key in ("steps", "up", "down")}
            found[name] = {"rounds": federated[name]["rounds"], **mean}
        else:
            kinds = WITH_EVERY_EXPERT | set(info.needs)
            up = sum(item["bytes"] for item in record.audit if item["kind"] in kinds) / len(record.sites)
            found[name] = {"rounds": 1, "steps": float(np.mean(list(steps.values()))), "up": up, "down": float(own["down"])}
    return found
