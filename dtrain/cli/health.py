"""The command that asks servers whether they answer."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from dtrain import env
from dtrain.errors import ConnectError, UsageError
from dtrain.ps import health


@dataclass(frozen=True, kw_only=True)
class Health:
    """Ask a server whether it answers: dtrain health tcp://127.0.0.1:5555. For probes; the job does not notice.

    Ends with 0, or with 69 and what was found: nobody, something else than a server, one that is stopped or stuck, one
    that refuses the key, or one whose job has failed.
    """

    address: Annotated[str | None, Positional, arg(metavar="ADDRESS", help_behavior_hint="")] = None
    """ipc:///path or tcp://host:port, several with commas between. Default: DTRAIN_SERVERS, or from DMLC_PS_ROOT_URI
    and DMLC_PS_ROOT_PORT where these name a server."""
    timeout_s: float = 3.0
    """Longest wait for an answer, in seconds; several servers are asked at once."""
    keys: Annotated[str | None, arg(metavar="DIR", help_behavior_hint="")] = None
    """Directory of CURVE keys; the servers' own will do. Default: DTRAIN_KEYS."""
    if_any: bool = False
    """Nobody at the address is well too: for the health check of an image that runs workers as well."""

    def run(self, argv: Sequence[str]) -> int:
        place = env.resolve(role="server", rank=0, servers=self.address, keys=self.keys)
        if place.servers is None:
            raise UsageError("no address: give tcp://host:port, or set DTRAIN_SERVERS")
        keys = None if place.keys is None else Path(place.keys)
        addresses = place.servers.split(",")
        with ThreadPoolExecutor(len(addresses)) as pool:
            asked = [pool.submit(health.ask, a, keys=keys, timeout_s=self.timeout_s) for a in addresses]
        for address, answer in zip(addresses, asked, strict=True):
            try:
                found = answer.result()
            except ConnectError:
                if not self.if_any:
                    raise
                print(f"nobody listens at {address}")
                continue
            which = f"server {found.server} of {found.num_servers} at {address}"
            print(f"{which} answers: {found.workers} of {found.world_size} workers are here")
        return 0
