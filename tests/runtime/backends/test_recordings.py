"""Which runs of an engine are captured, and which captured ones are kept."""

from __future__ import annotations

import pytest

from visprune.errors import BundleError
from visprune.runtime.backends.recordings import Recordings


class Launches:
    """A device that says what it launches and closes."""

    stream = 0

    def __init__(self):
        self.launched, self.closed = [], []

    def synchronize(self):
        pass

    def record(self, work):
        work()
        return Recorded(self)


class Recorded:
    def __init__(self, device):
        self.device = device
        self.name = None

    def launch(self):
        self.device.launched.append(self.name)

    def close(self):
        self.device.closed.append(self.name)


@pytest.fixture
def device():
    return Launches()


def capture(recordings, name):
    recordings.capture((name,), object(), lambda: None)
    recordings._made[(name,)][0].name = name


def test_the_one_not_used_for_longest_makes_room(device):
    recordings = Recordings(device, "decoder")
    for name in "abcd":
        capture(recordings, name)
    assert recordings.launch(("a",))
    capture(recordings, "e")
    assert device.closed == ["b"]
    assert recordings.launch(("a",))
    assert not recordings.launch(("b",))
    recordings.close()
    assert sorted(device.closed) == list("abcde")


def test_a_run_is_captured_when_it_comes_twice_in_a_row(device):
    recordings = Recordings(device, "decoder")
    assert [recordings.repeats((key,)) for key in "aabab"] == [False, True, False, False, False]


def test_an_engine_that_fails_while_it_is_captured_goes_on_without(device):
    """What the engine has just done, it can go on doing."""
    recordings = Recordings(device, "decoder")

    def fail():
        raise BundleError("tensorrt cannot run it.", "")

    with pytest.warns(RuntimeWarning, match="decoder runs without a CUDA graph.*cannot run it"):
        recordings.capture(("a",), object(), fail)
    assert not recordings.launch(("a",))
    assert not recordings.repeats(("b",))
    assert not recordings.repeats(("b",))
