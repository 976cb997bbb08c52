"""fedmerge: hospitals share models instead of data, and an unseen hospital merges them per batch.

Telemetry of every library below us is switched off here, because each reads its switch when it is first imported.
"""

import os

__version__ = "0.1.0"

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
if not os.environ.get("RAY_ADDRESS"):
    # A Ray of our own talks over loopback and listens nowhere else. The name is misleading: it works on Linux, too.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # If this process is killed, two of Ray's daemons wait so long for a head that is gone, by default a minute.
    os.environ.setdefault("RAY_gcs_rpc_server_reconnect_timeout_s", "15")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
