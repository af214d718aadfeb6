"""A thread that looks at connections over a network, and takes answers as they come, while the program computes."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable, Sequence

import zmq

from dtrain.errors import DtrainError

log = logging.getLogger(__name__)

_LOOK_S = 0.25
"""It looks by itself that often, whatever libzmq says."""


class Pump:
    """Calls `take` under the lock when something has come. A program that waits holds the lock and takes by itself."""

    def __init__(self, lock: threading.RLock, sockets: Sequence[zmq.Socket[bytes]], take: Callable[[], object]) -> None:
        """
        Args:
            lock: that keeps others from the sockets.
        """
        self._lock = lock
        self._take = take
        self._stopped = threading.Event()
        self._wake_read, self._wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._poll = select.poll()
        for fd in (self._wake_read, *(int(socket.getsockopt(zmq.FD)) for socket in sockets)):
            self._poll.register(fd, select.POLLIN)
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
            self._poll.poll(int(_LOOK_S * 1000))
            while not self._stopped.is_set():
                if self._lock.acquire(timeout=0.1):
                    break
            else:
                return
            try:
                self._take()
            except DtrainError:
                return  # the link remembers it, and tells the program when it next looks
            except Exception:
                log.exception("a worker's pump ended; answers are taken when the program waits")
                return
            finally:
                self._lock.release()
