"""Time that passes when it is told to, so that what is measured does not depend on how busy the machine is."""

import time

import pytest


class Clock:
    now = 0.0

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """In the place of time.perf_counter and time.sleep."""
    made = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: made.now)
    monkeypatch.setattr(time, "sleep", made.sleep)
    return made
