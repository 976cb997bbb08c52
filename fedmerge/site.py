"""What `sites/*.yaml` may say: one hospital."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fedmerge.data.shift import Scanner
from fedmerge.data.source import SOURCES
from fedmerge.folder import Spec

AnySource: Any = SOURCES.union()


class Site(Spec):
    """One hospital: where its images come from, which scanner takes them, and what it agrees to show."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]{0,39}$", description="unique name, as scenarios call it")
    title: str = Field("", description="one line for the report")
    source: AnySource = Field(description="where the images come from")
    scanner: Scanner = Field(default_factory=Scanner, description="what the hospital's scanner does to every image")
    validation: float = Field(0.2, gt=0, lt=1, description="share of the groups (patients) held out to select and calibrate")
    samples: int = Field(0, ge=0, le=12, description="images that the hospital agrees to show in the report; audited")
