"""The collector stands still while tables are built, and is as it was afterwards."""

from __future__ import annotations

import gc

import pytest

from adalora_dist.io.collector import no_collection


def test_it_is_as_it_was_afterwards() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), no_collection():
        with no_collection():
            assert not gc.isenabled()
        assert not gc.isenabled()  # the outer one has not ended
        _ = 1 / 0
    assert gc.isenabled()
