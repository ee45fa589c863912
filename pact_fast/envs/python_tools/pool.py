"""A pool of sandbox workers that run untrusted Python functions, a few milliseconds per call."""

from __future__ import annotations

import _thread
import json
import os
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

from pact_fast.envs.python_tools.client import Worker
from pact_fast.envs.python_tools.fork_server import ForkServer
from pact_fast.envs.python_tools.protections import PROTECTIONS
from pact_fast.errors import PactError
from pact_fast.registry import did_you_mean

GRACE_SECONDS = 5.0  # after a call's own limit, before its worker counts as dead
KILL_SECONDS = 2.0  # for a worker to clean up, before it is killed
WORKER_FAILED = "error: the tool broke its worker process"
CLOSED = "the tool pool is closed; make a new one"
SANDBOXES = ("namespaces", "bubblewrap")
AUTO, AUTO_WORKERS = "auto", 64  # waiting costs a worker about half a MB


class SandboxPool:
    """Warm workers, each of which runs one call at a time. Thread-safe; must not be used in a forked child.

        with SandboxPool(workers=4) as pool:
            pool.call("def add(a, b): return a + b", "add", {"a": 1, "b": 2})     # "3"

    Every call gets a fresh process, forked from a worker that has the common standard modules loaded. Other standard
    modules can be imported, site-packages cannot. The process starts in an empty folder that is removed after the call,
    without environment variables, open files or input, with limits on CPU time, memory, file size, open files and
    processes. `protections` names the further ones that the system allowed; `PROTECTIONS` and docs/environments.md
    describe them.

    It contains accidents and clumsy tools and is not a security boundary; docs/environments.md lists its protections and
    their gaps. Run code that you expect to be hostile in a virtual machine.

    Args:
        workers: Calls that may run at the same time; "auto": as many as there are, up to 64. A worker starts when it is
            first needed.
        timeout: Seconds of wall-clock time per call; CPU time is limited to about the same.
        memory_mb: Address space of a process of a call, MiB.
        max_output: Characters of an observation; a longer one is truncated, with a note.
        sandbox: "namespaces", or "bubblewrap" to start every call with `bwrap`.
        require: Protections without which the pool refuses to run.

    Raises:
        PactError: An argument is out of range, workers cannot start (not Linux, or a kernel older than 5.3), or a
            required protection is missing.
    """

    def __init__(
        self,
        workers: int | str = 4,
        *,
        timeout: float = 10.0,
        memory_mb: int = 1024,
        max_output: int = 65536,
        sandbox: str = "namespaces",
        require: Sequence[str] = (),
    ):
        if isinstance(workers, str):
            if workers != AUTO:
                raise PactError(f"env.args.workers must be a number or {AUTO}, not '{workers:.60}'")
            workers = AUTO_WORKERS
        if workers < 1 or timeout <= 0 or memory_mb < 64 or max_output < 1:
            raise PactError("the tool pool needs workers >= 1, timeout > 0, memory_mb >= 64 and max_output >= 1")
        if sandbox not in SANDBOXES:
            hint = did_you_mean(str(sandbox), list(SANDBOXES))
            raise PactError(f"env.args.sandbox: unknown '{sandbox}'{hint}; there are {', '.join(SANDBOXES)}")
        _check_names(require)
        self.timeout = timeout
        self._state = _State(workers, (memory_mb, max_output, sandbox), frozenset(require))
        self._finalizer = weakref.finalize(self, _State.close, self._state)  # also at exit
        self.protections: frozenset[str] = self._state.start_first()

    def call(self, source: str, function: str, arguments: dict[str, Any], timeout: float | None = None) -> str:
        """Execute `source`, call `function(**arguments)` and return the observation. Waits while all workers are busy.

        A dict or list is returned as JSON, anything else as str, None as the printed text. A tool that fails in any way
        gives a text that starts with `error: `. If the caller is interrupted while it waits, the call's worker is killed.

        Args:
            source: Python source that defines the function.
            function: Its name.
            arguments: Keyword arguments, JSON data.
            timeout: Seconds; None: the pool's.

        Raises:
            PactError: The pool is closed.
        """
        try:
            encoded = json.dumps(arguments)
        except (TypeError, ValueError, RecursionError) as error:
            return f"error: the arguments are not JSON: {error}"
        request = {"source": source, "function": function, "arguments": encoded}
        job = _Job(request, self.timeout if timeout is None else timeout)
        try:
            self._state.submit(job)
            return job.result()
        except BaseException:  # whatever interrupts the caller: KeyboardInterrupt, a signal handler's exception
            job.abandon()
            raise

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers that are running."""
        return [worker.pid for worker in self._state.running()]

    def close(self) -> None:
        """Stop all workers, within 3 seconds. Calls under way end with an error observation, later ones raise.

        May be called from any thread, in the middle of calls, and more than once.
        """
        self._state.close()

    def __enter__(self) -> SandboxPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Job:
    """A call on its way: handed to one thread, which finishes it.

    Its caller waits on a bare lock. The condition of a Future is Python code, and what a signal handler raises in the
    middle of that reaches the caller as another exception: RuntimeError, "cannot release un-acquired lock".
    """

    def __init__(self, request: dict[str, Any], timeout: float):
        self.request, self.timeout = request, timeout
        self._lock = threading.RLock()
        self._worker: Worker | None = None
        self._abandoned = False
        self._result: str | BaseException | None = None
        self._finished = threading.Lock()
        self._finished.acquire()

    def result(self) -> str:
        """Wait for the observation. Raises the exception passed to `finish`, or any that interrupts the caller."""
        self._finished.acquire()
        if isinstance(self._result, BaseException):
            raise self._result
        assert self._result is not None
        return self._result

    def finish(self, result: str | BaseException) -> None:
        self._result = result
        self._finished.release()

    def run(self, worker: Worker) -> str:
        """The observation. OSError if the worker fails, or the caller gives up."""
        with self._lock:
            if self._abandoned:
                return ""
            self._worker = worker
        try:
            return worker.call(self.request, self.timeout, GRACE_SECONDS)
        finally:
            with self._lock:
                self._worker = None

    def abandon(self) -> None:
        """Abandon the call: do not start it, or end it by disconnecting the worker."""
        with self._lock:
            self._abandoned = True
            if self._worker:
                self._worker.disconnect()


class _State:
    """State shared by the pool's threads. It holds no reference to the pool, so that an unused pool is closed.

    A worker belongs to a thread of the pool and never to a caller: an exception that reaches a caller in the middle of a
    call (Ctrl-C) can neither leave an unread answer to the next one nor lose a worker.
    """

    def __init__(self, workers: int, options: tuple[int, int, str], require: frozenset[str]):
        self._limit, self._forks, self._require = workers, ForkServer(*options), require
        self._owner = os.getpid()
        self._lock = threading.RLock()  # a signal handler may close the pool
        self._closed = False
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._idle = 0  # threads that wait for a job
        self._threads = 0
        self._running: set[Worker] = set()
        self._first: Worker | None = None
        self._promised: frozenset[str] = frozenset()  # protections of the first worker, which every other one has too

    def start_first(self) -> frozenset[str]:
        """Start a worker, so that errors come early. Returns its protections."""
        self._first = self._start(probe=True)  # those to come are forked from the same process
        self._promised = self._first.protections
        return self._first.protections

    def submit(self, job: _Job) -> None:
        if os.getpid() != self._owner:
            raise PactError("the tool pool belongs to another process; make a new one after a fork")
        with self._lock:
            if self._closed:
                raise PactError(CLOSED)
            # idle threads first: their workers are warm
            if self._idle:
                self._idle -= 1
            elif self._threads < self._limit:
                self._threads += 1
                try:
                    _thread.start_new_thread(self._serve, ())  # Thread.start waits in Python code: see _Job
                except RuntimeError:  # the system has no more
                    self._threads -= 1
                    raise
            self._jobs.put(job)

    def running(self) -> list[Worker]:
        with self._lock:
            return list(self._running)

    def close(self) -> None:
        if os.getpid() != self._owner:  # in a forked child, which only drops its copy of the pool
            return
        with self._lock:
            self._closed = True
            stopping = self.running()
        for worker in stopping:
            worker.disconnect()
        self._drop_waiting_jobs()
        for _ in range(self._threads):
            self._jobs.put(None)
        deadline = time.monotonic() + KILL_SECONDS
        for worker in stopping:
            self._retire(worker, max(0.0, deadline - time.monotonic()))
        self._forks.close()  # last: it is the parent of the workers

    def _serve(self) -> None:
        """Run jobs until the pool is closed. A thread of the pool."""
        with self._lock:
            worker, self._first = self._first, None
        while (job := self._jobs.get()) is not None:
            answer: str | BaseException
            try:
                worker = worker or self._start()
                answer = job.run(worker)
            except OSError:  # includes a timeout and the death of the worker
                answer = WORKER_FAILED
            except BaseException as error:  # a worker that does not start
                answer = WORKER_FAILED if self._closed else error
            if worker and (answer is WORKER_FAILED or not isinstance(answer, str) or worker.disconnected):
                self._retire(worker, KILL_SECONDS)
                worker = None
                self._forks.discard()  # the cause that ended or stopped a worker may have hit the server, too
            self._count_idle()  # before the answer: its caller may have the next call
            job.finish(answer)
            del job, answer

    def _count_idle(self) -> None:
        with self._lock:
            self._idle += 1

    def _drop_waiting_jobs(self) -> None:
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return
            if job:
                job.finish(WORKER_FAILED)

    def _start(self, *, probe: bool = False) -> Worker:
        with self._lock:
            if self._closed:
                raise PactError(CLOSED)
        worker = Worker(self._forks)  # without the lock: workers start side by side
        with self._lock:
            self._running.add(worker)
            if self._closed:
                worker.disconnect()
        try:
            worker.wait_until_ready(probe=probe)
        except BaseException:
            self._retire(worker, 0.0)
            raise
        if missing := (self._require | self._promised) - worker.protections:
            self._retire(worker, KILL_SECONDS)
            names = ", ".join(name for name in PROTECTIONS if name in missing)
            raise PactError(
                f"a tool worker lacks the protection {names}, which the first one has"
                if missing <= self._promised
                else f"env.args.require: this machine does not give tools the protection {names}; docs/environments.md says "
                "what each needs"
            )
        return worker

    def _retire(self, worker: Worker, grace_period: float) -> None:
        worker.kill(grace_period)
        with self._lock:
            self._running.discard(worker)


def _check_names(require: Sequence[str]) -> None:
    """PactError unless these are names of protections."""
    if isinstance(require, str) or not all(isinstance(name, str) for name in require):
        raise PactError(f"env.args.require must be a list of protections, not {require!r:.60}")
    for name in require:
        if name not in PROTECTIONS:
            raise PactError(
                f"env.args.require: unknown protection '{name:.60}'{did_you_mean(name, list(PROTECTIONS))}; there are "
                f"{', '.join(PROTECTIONS)}"
            )
