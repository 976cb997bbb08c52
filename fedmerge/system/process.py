"""Child processes that end when their parent does, however that ends, and that share the cores of their machine."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from fedmerge.errors import Problem, ScenarioError

if sys.platform == "linux":
    from multiprocessing.context import ForkServerContext as Context
    from multiprocessing.context import ForkServerProcess as Process
else:
    from multiprocessing.context import SpawnContext as Context
    from multiprocessing.context import SpawnProcess as Process

Task = TypeVar("Task")
Found = TypeVar("Found")

STDIN = 0

ENDING = ("SIGTERM", "SIGHUP")
"""Signals that ask a command to end: `docker stop`, a cluster's scheduler, a lost connection. Windows has but the first."""

SLOTS = "FEDMERGE_CORE_SLOTS"
"""Names the folder of a federation's slots to its processes; it is set by who starts them, and nobody else."""

SOCKET_BYTES = 107 if sys.platform == "linux" else 103
"""Of the path of a socket, on this system."""

LONGEST_TMPDIR = SOCKET_BYTES - len("/pymp-12345678/listener-12345678")
"""Bytes of the folder for temporary files, below which multiprocessing names its sockets."""

GLANCE_S = 0.05
"""Between two looks at slots that are all taken."""


class Terminated(KeyboardInterrupt):
    """One of the signals that ask this process to end has come: whatever cleans up after Ctrl-C cleans up after it, too."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


@contextmanager
def ending_as_interrupt() -> Iterator[None]:
    """Raises Terminated where a signal asks to end, while the block runs. One that is ignored (`nohup`) stays ignored.

    A second signal during the clean-up is not heard: the first has said it all, and SIGKILL is there for the impatient.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in ENDING if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def end(number: int, _: object) -> None:
        for other in ours:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    ours = [number for number, handler in before.items() if handler == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, before[number])


@contextmanager
def own_signals() -> Iterator[None]:
    """What this process does at SIGTERM is afterwards what it did before: Ray sets an answer of its own as it starts."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """Of PyTorch, where nobody says how many: what OMP_NUM_THREADS says, as anywhere else, or one for each core.

    More of them than cores are free is slow out of proportion: even small tensors wait for a core that is busy elsewhere.
    """
    given = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(given) if given.isdecimal() and int(given) > 0 else cores()


def wait_briefly() -> None:
    """PyTorch's threads that wait for each other sleep after some 25 us. For a command, before torch is imported.

    GNU's OpenMP lets them look for milliseconds. Where a core is busy elsewhere, they use up the time of whom they wait for: a
    stream beside eight other programs took 10 times the CPU seconds, with the same bits. Whoever has said how to wait is heard.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # what it takes itself where threads are more than cores


@contextmanager
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: bits do not hang on the cores, and small tensors do not wait for a core that is busy elsewhere."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def free_memory() -> int | None:
    """Bytes left for new arrays: of the machine, or of its container where that is less; None if the system does not tell."""
    found = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found.append(int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024)
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        found.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return min(found, default=None)


def make_core_slots(folder: Path, count: int) -> dict[str, str]:
    """Slots for so many runs at a time, as files in a new folder; the environment of processes that are to share them."""
    folder.mkdir()
    for number in range(max(1, count)):
        (folder / f"{number}.slot").touch()
    return {SLOTS: str(folder)}


@contextmanager
def core_slot() -> Iterator[None]:
    """Holds one slot of this federation while the block runs; without a federation that has slots, nothing is waited for.

    One process at a time looks for a free slot, and the others queue behind it: who gives one back does not get it again while
    others wait. A slot is a file lock, so that of a process that died is free.
    """
    slots = sorted(Path(os.environ[SLOTS]).glob("*.slot")) if SLOTS in os.environ else []
    if not slots:
        yield
        return
    with FileLock(slots[0].with_name("queue")):
        held = _free_slot(slots)
    try:
        yield
    finally:
        held.release()


def _free_slot(slots: list[Path]) -> FileLock:
    while True:
        for slot in slots:
            if lock := free_lock(slot):
                return lock
        time.sleep(GLANCE_S)


def free_lock(file: Path) -> FileLock | None:
    """The lock of a file, taken, if nobody holds it; it ends with this process, however that ends. Raises OSError."""
    lock = FileLock(file, thread_local=False)  # whichever thread gives it back
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def end_with_parent() -> None:
    """End this process group as soon as standard input, a pipe that only the parent holds open, is closed.

    For a process that leads a group of its own: what it has started ends with it.
    """

    def wait() -> None:
        while os.read(STDIN, 1):  # not through sys.stdin, whose lock a thread must not hold when the interpreter ends
            pass
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=wait, name="lifeline", daemon=True).start()


_LAUNCH = threading.Lock()
"""While it is held, `__main__` is another module."""


class _ProcessApart(Process):
    """Imports the modules of what it is to do, and not the program that runs here as well.

    multiprocessing has a new process import that program first: a script that calls `fedmerge.run` without
    `if __name__ == "__main__":` would run once more in it.
    """

    def start(self) -> None:
        with _LAUNCH:
            program = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")  # of which there is no file to import
            try:
                super().start()
            finally:
                sys.modules["__main__"] = program


class _ContextApart(Context):
    Process = _ProcessApart


@cache
def process_context(*modules: str) -> Context:
    """How processes are made that share nothing with this one.

    On Linux they are forked from a server that begins now to import what this process has, once for all of them, where each would
    take seconds for torch and timm; it ends with this process. Elsewhere a fork is not safe, and each imports for itself.
    modules: what such processes import beside, unless the server has begun. Raises ScenarioError if the folder for temporary files
    leaves no room for multiprocessing's sockets.
    """
    length = len(os.fsencode(tempfile.gettempdir()))
    if os.name == "posix" and length > LONGEST_TMPDIR:
        expected = f"at most {LONGEST_TMPDIR}, since sockets of worker processes allow no more"
        mend = "Set TMPDIR=/tmp, or another short folder"
        raise ScenarioError([Problem("TMPDIR", "", f"a path of {length} characters", expected, mend)])
    context = _ContextApart()
    if sys.platform != "linux":
        return context
    here = [name for name in sys.modules if name == "timm" or name.startswith("fedmerge.")]
    context.set_forkserver_preload([*here, *modules])
    from multiprocessing import forkserver, resource_tracker  # here, for not every system has them

    # Ctrl-C is for this process: while the server imports, it would show a traceback. The tracker begins first, for it unblocks.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def owners(
    count: int, begin: Callable[..., None] | None = None, arguments: tuple[Any, ...] = (), tasks_each: int | None = None
) -> ProcessPoolExecutor:
    """Processes that own images for a while; each first calls `begin`. The pool's own would wait for ever for a killed parent."""
    begun = (dict(os.environ), begin, arguments)
    return ProcessPoolExecutor(count, process_context(), _begin, begun, max_tasks_per_child=tasks_each)


def spread(work: Callable[[Task], Found], tasks: Iterable[Task], processes: int) -> Iterator[Found]:
    """What `work` finds of every task, in their order, by so many processes; a few tasks ahead, so that answers do not pile up.

    The processes import the module of `work` and nothing else, not the program that runs here as well; they end when nobody holds
    their standard input any more. If one dies, this process does what is left. work: a function of a module that can be imported.
    """
    if processes < 2:
        yield from map(work, tasks)
        return
    path = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-P", "-c", f"from {__name__} import _work; _work()"]
    apart: dict[str, Any] = {"process_group": 0} if hasattr(os, "setpgid") else {}  # Ctrl-C is for this process
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}, **apart)
        for _ in range(processes)
    ]
    idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
    for process in started:
        idle.put(process)

    def ask(task: Task) -> Found:
        process = idle.get()
        assert process.stdin and process.stdout
        try:
            pickle.dump((work, task), process.stdin)
            process.stdin.flush()
            found, error = pickle.load(process.stdout)
        except (OSError, EOFError, pickle.UnpicklingError):  # it is gone, as when memory has run out
            found, error = work(task), None
        finally:
            idle.put(process)
        if error is not None:
            raise error
        return found  # type: ignore[no-any-return]

    ahead: deque[Future[Found]] = deque()
    threads = ThreadPoolExecutor(processes)
    try:
        for task in tasks:
            ahead.append(threads.submit(ask, task))
            if len(ahead) > 2 * processes:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        for process in started:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in started:
            with suppress(OSError), process:  # closes the pipes, of which one may hold what was not heard any more
                pass


def _work() -> None:
    """In such a process: answer one task after the other. What decoders print goes where errors go."""
    told = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            work, task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        answer: tuple[Any, Exception | None]
        try:
            answer = (work(task), None)
        except Exception as error:
            answer = (None, error)
        pickle.dump(answer, told, pickle.HIGHEST_PROTOCOL)
        told.flush()


def begin_apart(environment: dict[str, str], ending: int | None = None) -> None:
    """First of all in a process of `process_context`: a fork has the environment of the time when its server began, and no Ctrl-C.

    When who asked for this process is gone, however that ended, it ends: at once, or by the signal `ending`.
    """
    os.environ.clear()
    os.environ.update(environment)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    threading.Thread(target=_follow, args=(ending,), name="lifeline", daemon=True).start()


def _begin(environment: dict[str, str], begin: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    begin_apart(environment)
    if begin is not None:
        begin(*arguments)


def _follow(ending: int | None) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        if ending is None:
            os._exit(1)
        os.kill(os.getpid(), ending)
