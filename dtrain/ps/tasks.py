"""Work on pieces of tensors, shared between threads, and done a little at a time between looks at a socket."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable


class Pool:
    """Threads that help the caller with its tasks. The process should have called `torch.set_num_threads(1)`."""

    def __init__(self, threads: int) -> None:
        """
        Args:
            threads: all that work on a task, the caller's own among them.
        """
        self._queue: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._helpers = [
            threading.Thread(target=self._help, daemon=True, name=f"dtrain-task-{i}") for i in range(1, threads)
        ]
        for helper in self._helpers:
            helper.start()

    def share(self, task: Task) -> None:
        """Let the helpers take pieces of it, after what they were given before."""
        for _ in self._helpers:
            self._queue.put(task)

    def close(self) -> None:
        """End the helpers, when all that was shared is done. Idempotent."""
        for _ in self._helpers:
            self._queue.put(None)
        for helper in self._helpers:
            helper.join()
        self._helpers = []

    def _help(self) -> None:
        while (task := self._queue.get()) is not None:
            task.help()
            del task  # else its memory would stay mapped until the next one comes


class Task:
    """Pieces 0 to count - 1, each done once, by whoever takes it. The caller decides how long it works at a time."""

    def __init__(self, count: int, do: Callable[[int], None], *, pool: Pool | None = None) -> None:
        """
        Args:
            do: does one piece; called from several threads, in no fixed order.
            pool: who helps; None: nobody.
        """
        self._count = self._left = count
        self._do = do
        self._next = 0
        self._lock = threading.Lock()
        self._error: BaseException | None = None
        self._over = threading.Event()
        if not count:
            self._over.set()
        if pool is not None and count > 1:
            pool.share(self)

    def advance(self, budget_s: float) -> bool:
        """Work on it for about that long, at least one piece; whether it is done.

        Raises what `do` raised, in whichever thread.
        """
        deadline = time.monotonic() + budget_s
        while self._one():
            if time.monotonic() >= deadline:
                break
        else:  # none are left to take; helpers may be busy with their last ones
            self._over.wait(max(0.0, deadline - time.monotonic()))
        return self._done()

    def finish(self) -> None:
        """Work on it until it is done. Raises what `do` raised."""
        while self._one():
            pass
        self._over.wait()
        self._done()

    def help(self) -> None:
        """Take pieces while there are any. Errors are for the caller."""
        while self._one():
            pass

    def _done(self) -> bool:
        if self._over.is_set() and self._error is not None:
            raise self._error
        return self._over.is_set()

    def _one(self) -> bool:
        """Do one piece, if one is left."""
        with self._lock:
            number = self._next
            if number >= self._count:
                return False
            self._next += 1
        try:
            self._do(number)
        except BaseException as error:  # also of a helper: the caller is to know
            with self._lock:
                self._error = self._error or error
                self._left -= self._count - self._next  # what nobody takes any more
                self._next = self._count
        with self._lock:
            self._left -= 1
            if not self._left:
                self._over.set()
        return True
