"""By which interface another host is reached."""

from __future__ import annotations

import pytest

from dtrain import env
from dtrain.errors import UsageError
from dtrain.interfaces import address_towards, interface_towards


@pytest.mark.parametrize("store", ["tcp://127.0.0.1:29500", "tcp://localhost:29500", "tcp://127.9.9.9:1"])
def test_who_names_this_host_stays_on_it(store: str):
    """Else gloo would listen to the network, where nobody has asked for it."""
    assert interface_towards(store) == env.LOOPBACK


def test_a_name_of_no_host():
    with pytest.raises(UsageError, match=r"store is 'tcp://nosuch\.invalid:1': nosuch\.invalid is the name of no host"):
        address_towards("tcp://nosuch.invalid:1", "store")
    assert interface_towards("tcp://nosuch.invalid:1") is None
