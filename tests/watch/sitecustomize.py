"""Put first on PYTHONPATH, this watches every Python process of a run: sockets it asks for, and what it hands to others.

`FEDMERGE_WATCH` names a folder. `sockets-*.txt` gets a line for each look-up, connection, datagram and listener; `sent-*` gets
whatever is serialized for another Ray process, arguments and answers of Flower's clients and of the target among them; `tree-*`
gets temporary folders as they were before they were deleted.
"""

# pathlib stays out: this runs at the start of every process.
# ruff: noqa: PTH112, PTH123

import importlib.machinery
import json
import os
import shutil
import sys
import time

FOLDER = os.environ.get("FEDMERGE_WATCH", "")
OWN = os.environ.get("FEDMERGE_CACHE", "")
SOCKETS = {"getaddrinfo", "gethostbyname", "gethostbyaddr", "connect", "sendto", "sendmsg", "bind"}


def on_event(event, args):
    if event.startswith("socket.") and event.removeprefix("socket.") in SOCKETS:
        said = [event.removeprefix("socket."), repr(args[0] if "get" in event else args[1]), " ".join(sys.argv[:2])]
        with open(f"{FOLDER}/sockets-{os.getpid()}.txt", "a") as file:
            file.write(json.dumps(said) + "\n")
    elif event == "shutil.rmtree" and os.path.isdir(args[0]) and not str(args[0]).startswith((OWN, FOLDER)):
        shutil.copytree(args[0], f"{FOLDER}/tree-{os.getpid()}-{time.monotonic_ns()}", symlinks=True, ignore_dangling_symlinks=True)


class Tee:
    """Loads Ray's serialization and keeps a copy of what goes through it."""

    def find_spec(self, name, path, target=None):
        if name != "ray._private.serialization":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            serialize = module.SerializationContext.serialize

            def teed(self, value):
                done = serialize(self, value)
                with open(f"{FOLDER}/sent-{os.getpid()}-{time.monotonic_ns()}", "wb") as file:
                    file.write(value if isinstance(value, bytes) else done.to_bytes())
                return done

            module.SerializationContext.serialize = teed

        spec.loader.exec_module = exec_module
        return spec


if FOLDER:
    sys.addaudithook(on_event)
    sys.meta_path.insert(0, Tee())
