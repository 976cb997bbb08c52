"""No way out: Ray and Flower start so that no process of a run looks for anything beyond this machine.

Ray's dashboard process asks the cloud's metadata service (169.254.169.254, metadata.google.internal) over HTTP which cloud it is
in, with its dashboard and usage statistics off, too, and has no switch for it (`UsageStatsHead.run` of ray 2.55). It heeds proxies,
though, so it is given one that leads nowhere. Processes that Ray starts inherit it: hospitals and the target have no HTTP at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

NOWHERE = "http://127.0.0.1:9"
"""The port for what is to be discarded: as a rule nobody listens there, and whoever does is on this machine."""

_SEALED = {
    **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), NOWHERE),
    "no_proxy": "localhost,127.0.0.1,::1",  # in place of the user's, which may name the cloud's metadata service
}


@contextmanager
def sealed() -> Iterator[None]:
    """What is started meanwhile inherits proxies that lead nowhere; this process gets its own back."""
    names = [spelt for name in _SEALED for spelt in (name, name.upper())]
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: _SEALED[name.lower()] for name in names})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
