"""Processes that train together, watched by one that does not: a death stops them all, and is told in one line.

JAX aborts a process that has lost another one, which no handler in that process can catch. A command therefore starts
its workers, waits for them, and speaks for them. With separate commands, one for each rank, each watches its own.
"""

import argparse
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import jax

HEARTBEAT_TIMEOUT = 20  # seconds after which a silent process is taken for dead
GRACE = 2.0  # seconds for more failures to come in: the first to be seen need not be the cause
FAILED, REFUSED = 1, 2  # exit statuses of workers
LONGEST = 500  # last words, in bytes
Run = Callable[[argparse.Namespace], None]


class SettingsError(Exception):
    """The settings do not fit the data, the devices or the other processes."""


def work(run: Run, settings: argparse.Namespace, rank: int, coordinator: str, last_words: Any) -> None:
    """The life of a worker, in a process of its own; its last words say what it died of."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    log_apart(settings.folder / f"process-{rank}.log")
    first = rank * settings.devices_per_process if settings.rank is None else 0
    try:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_num_cpu_devices", settings.devices_per_process)
        last_words.value = f"did not find all processes within {settings.start_timeout} s".encode()
        jax.distributed.initialize(
            coordinator,
            settings.processes,
            rank,
            local_device_ids=list(range(first, first + settings.devices_per_process)),
            initialization_timeout=settings.start_timeout,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            shutdown_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
        last_words.value = b"lost another process"
        run(settings)
        jax.distributed.shutdown()
    except Exception as error:
        traceback.print_exc(file=sys.__stderr__)
        name = "" if isinstance(error, SettingsError) else f"{type(error).__name__}: "
        reason = f"{name}{error}".splitlines()[0].encode("ascii", "replace")
        verdict = b"lost another process" if b"Gloo" in reason or b"NCCL" in reason else b"stopped"
        last_words.value = (verdict + b" (" + reason)[: LONGEST - 1] + b")"
        # Not sys.exit, whose clean-up waits for processes that may be gone.
        os._exit(REFUSED if isinstance(error, SettingsError) else FAILED)


def leave_with_parent() -> None:
    """Ends this process when the one that watches it has ended."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os._exit(FAILED)


def log_apart(path: pathlib.Path) -> None:
    """What libraries print goes to a file; Python's output stays where it is."""
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    with path.open("w") as log:
        for number in (1, 2):
            os.dup2(log.fileno(), number)


class Worker:
    """A worker, as seen by the process that watches it; its last words are in memory that outlives it."""

    def __init__(self, run: Run, settings: argparse.Namespace, rank: int, coordinator: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.rank, self.last_words = rank, context.RawArray("c", LONGEST)
        self.last_words.value = b"did not start"
        self.process = context.Process(target=work, args=(run, settings, rank, coordinator, self.last_words))
        self.process.start()

    def status(self) -> int:
        """Exit status, or minus the number of the signal that killed it."""
        self.process.join()
        return self.process.exitcode or 0

    def distance(self) -> int:
        """From the cause of a failure: JAX aborts a worker because of another one, and errors may have that cause."""
        return {FAILED: 1, -signal.SIGABRT: 2}.get(self.status(), 0)

    def was_refused(self) -> bool:
        """Whether it was its settings that stopped it."""
        return self.status() == REFUSED

    def obituary(self) -> str:
        if self.status() < 0 and self.status() != -signal.SIGABRT:
            return f"process {self.rank} was killed by {signal.Signals(-self.status()).name}"
        return f"process {self.rank} {self.last_words.value.decode()}"


def watch(run: Run, settings: argparse.Namespace) -> Worker | None:
    """Starts the workers of this command and waits until all have ended; if one fails the others are stopped.

    Args:
        run: what each worker does once it has found the others.
        settings: with ``processes``, ``devices_per_process``, ``coordinator`` and ``rank`` (or None and None),
            ``start_timeout`` in seconds and the ``folder`` of the logs; handed to run.

    Returns:
        The worker that is the likeliest cause of a failure, or None if all went well.
    """
    coordinator, workers = settings.coordinator or "127.0.0.1:0", []
    if settings.rank in (None, 0):  # JAX crashes where the port is taken
        with socket.create_server(("", int(coordinator.rpartition(":")[2]))) as free:
            coordinator = f"{coordinator.rpartition(':')[0]}:{free.getsockname()[1]}"
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # Workers inherit this: they leave Ctrl-C to the process that watches them.
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for rank in range(settings.processes) if settings.rank is None else [settings.rank]:
            workers.append(Worker(run, settings, rank, coordinator))
        signal.signal(signal.SIGINT, interrupt)
        print(", ".join(f"process {worker.rank}: pid {worker.process.pid}" for worker in workers), file=sys.stderr)
        return first_failure({worker.process.sentinel: worker for worker in workers})
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


def first_failure(running: dict[Any, Worker]) -> Worker | None:
    """Waits until all have ended, or one has failed; then a little, as the first to be seen may not be the cause."""
    failed, timeout = [], None
    while running and (ready := multiprocessing.connection.wait(list(running), timeout)):
        ended = [running.pop(sentinel) for sentinel in ready]
        failed += [worker for worker in ended if worker.status()]
        timeout = GRACE if failed else None
    return min(failed, key=Worker.distance, default=None)
