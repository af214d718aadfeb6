"""A thread that looks at connections over a network, and takes answers as they come, while the program computes."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Generic

from dtrain.errors import DtrainError
from dtrain.ps.bells import Bells, Whose

log = logging.getLogger(__name__)

_LOOK_S = 0.25
"""It looks by itself that often, whatever libzmq says."""


class Pump(Generic[Whose]):
    """Calls `take` under the lock when something has come. A program that waits holds the lock and takes by itself."""

    def __init__(
        self,
        lock: threading.RLock,
        bells: Bells[Whose | None],
        take: Callable[[list[Whose | None]], object],
    ) -> None:
        """
        Args:
            lock: that keeps others from the sockets.
            bells: of the sockets.
            take: is told whose bells rang; nobody's where it is time to look at all.
        """
        self._lock = lock
        self._take = take
        self._stopped = threading.Event()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._bells = bells
        bells.add(self._wake_read, None)
        self._thread = threading.Thread(target=self._run, name="dtrain-pump", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. Who stops it may hold the lock."""
        self._stopped.set()
        os.write(self._wake_write, b"x")
        self._thread.join()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _run(self) -> None:
        while not self._stopped.is_set():
            rung = self._bells.wait(_LOOK_S)
            while not self._stopped.is_set():
                if self._lock.acquire(timeout=0.1):
                    break
            else:
                return
            try:
                self._take(rung)
            except DtrainError:
                return  # the link remembers it, and tells the program when it next looks
            except Exception:
                log.exception("a worker's pump ended; answers are taken when the program waits")
                return
            finally:
                self._lock.release()
