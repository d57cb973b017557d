import signal
import time

import pytest

from kmq_jax.core import limits
from kmq_jax.core.errors import UserError
from kmq_jax.core.limits import time_limit

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="the system has no alarms")


@pytest.fixture
def rung():
    """How often the caller's own alarm rang."""
    times = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: times.append(time.monotonic()))
    yield times
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_an_alarm_of_the_caller_goes_on(rung):
    signal.setitimer(signal.ITIMER_REAL, 100.0, 7.0)
    with time_limit(50.0, "the block"):
        pass
    left, interval = signal.getitimer(signal.ITIMER_REAL)
    assert 50 < left <= 100 and interval == 7.0


def test_one_that_was_due_meanwhile_rings_behind_the_block(rung):
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    with time_limit(50.0, "the block"):
        time.sleep(0.05)
        assert not rung
    time.sleep(0.05)
    assert len(rung) == 1


def test_where_none_was_set_none_is_left(rung):
    with pytest.raises(UserError, match="the block: stopped after 0.01 s"), time_limit(0.01, "the block"):
        time.sleep(5)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0) and not rung


def test_an_alarm_at_the_very_end_comes_too_late(rung, monkeypatch):
    class Late:
        """The signals of the system, and an alarm just before the timer is turned off after the block."""

        ended = False

        def __getattr__(self, name):
            return getattr(signal, name)

        def setitimer(self, which, seconds, interval=0.0):
            if self.ended:
                self.ended = False
                signal.raise_signal(signal.SIGALRM)
            return signal.setitimer(which, seconds, interval)

    late, own = Late(), signal.getsignal(signal.SIGALRM)
    monkeypatch.setattr(limits, "signal", late)
    signal.setitimer(signal.ITIMER_REAL, 100.0)
    with time_limit(50.0, "the block"):
        late.ended = True
    assert signal.getsignal(signal.SIGALRM) is own
    assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
