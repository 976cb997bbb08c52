"""No way out: Ray and Flower start so that no process of a run looks for anything beyond this machine.

Ray's dashboard process asks the cloud's metadata service (169.254.169.254, metadata.google.internal) over HTTP which cloud it is
in, with its dashboard and usage statistics off, too, and has no switch for it (`UsageStatsHead.run` of ray 2.55). It heeds proxies,
though, so it is given one that leads nowhere. Processes that Ray starts inherit it: hospitals and the target have no HTTP at all.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import getproxies

NOWHERE = "http://127.0.0.1:9"
"""The port for what is to be discarded: as a rule nobody listens there, and whoever does is on this machine."""

_SEALED = {
    **dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), NOWHERE),
    "no_proxy": "localhost,127.0.0.1,::1",  # in place of the user's, which may name the cloud's metadata service
}


SILENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def silence() -> None:
    """Switch off the telemetry of Flower, Ray and the model hub. Each reads its switch when it is imported, so the seams call this
    first; importing fedmerge itself changes nothing."""
    os.environ.update(SILENT)
    warnings.filterwarnings("ignore", message="IProgress not found")  # the hub's progress bars in a notebook, which are not used
    if not os.environ.get("RAY_ADDRESS"):
        # A Ray of our own talks over loopback and listens nowhere else. The name is misleading: it works on Linux, too.
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        # Ray would run its workers at niceness 15: beside any other work on the machine the target starves.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # If this process is killed, two of Ray's daemons wait so long for a head that is gone, by default a minute.
        os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


@contextmanager
def sealed() -> Iterator[None]:
    """What is started meanwhile inherits proxies that lead nowhere; this process gets its own back."""
    names = [spelled for name in _SEALED for spelled in (name, name.upper())]
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


def cached_weights(hub: str, filename: str | None, cache: Path | None) -> Path | None:
    """The file of weights of a model of the hub, if its cache holds it; nobody is asked. hub: such as timm/resnet18.a1_in1k."""
    if not hub:
        return None
    from huggingface_hub import try_to_load_from_cache

    for name in [filename] if filename else ["model.safetensors", "pytorch_model.bin"]:
        found = try_to_load_from_cache(hub, name, cache_dir=cache)
        if isinstance(found, str):
            return Path(found)
    return None


def hub_is_found() -> bool:
    """Whether the hub's name leads anywhere from here. Its client would ask twelve times, and print each, before it gives up."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies().keys() & {"https", "all"}:  # who is behind a proxy leaves names to it
        return True
    host = constants.ENDPOINT.partition("//")[2].partition("/")[0]
    try:
        return bool(socket.getaddrinfo(host.partition(":")[0], None))
    except OSError:
        return False
