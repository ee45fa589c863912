"""Inside, garbage collections see new objects only; afterwards all of them."""

import gc
import weakref

import pytest

from pact_fast.train.frozen_heap import frozen_heap


class Cycle:
    def __init__(self):
        self.me = self


def test_new_cycles_are_collected_and_old_objects_are_not_walked_through():
    old = [Cycle() for _ in range(1000)]
    with frozen_heap():
        assert not any(item is old[0] for item in gc.get_objects()) and gc.get_freeze_count() > 1000
        new = weakref.ref(Cycle())
        gc.collect()
        assert new() is None
    assert gc.get_freeze_count() == 0 and any(item is old[0] for item in gc.get_objects())


def test_what_was_garbage_before_does_not_stay():
    garbage = weakref.ref(Cycle())
    with frozen_heap():
        assert garbage() is None


def test_an_error_thaws():
    with pytest.raises(ValueError), frozen_heap():
        raise ValueError
    assert gc.get_freeze_count() == 0
