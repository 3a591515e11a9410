import threading

import pytest

from konic.finetuning.system.pickling import pickled_by_value, what_cannot_be_pickled

LOCK = threading.Lock()
LIMIT = 3


class OfAttribute:
    def __init__(self):
        self.limit, self.opened = 3, threading.Lock()


class OfGlobal:
    def score(self):
        with LOCK:
            return LIMIT


def of_closure():
    lock = threading.Lock()

    class Mine:
        def score(self):
            return lock

    return Mine()


def of_name_without_value():
    class Mine:
        def __init__(self):
            self.lock = LOCK

        def score(self):
            return later

    if LIMIT == 0:
        later = 1
    return Mine()


class Own:
    def __reduce__(self):
        raise TypeError("not this one")


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (OfAttribute(), "its attribute 'opened'"),
        (of_closure(), "'lock', which 'score' uses"),
        (Own(), ""),
        (of_name_without_value(), "its attribute 'lock'"),
    ],
)
def test_what_holds_an_object_back_is_named(value, words):
    with pytest.raises(TypeError):
        pickled_by_value(value, [])
    assert what_cannot_be_pickled(value, []) == words


def test_a_global_that_a_method_uses_is_named():
    """Where its module is sent by value, as a script is."""
    assert what_cannot_be_pickled(OfGlobal(), []) == "'LOCK', which 'score' uses"
