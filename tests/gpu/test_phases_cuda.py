"""Where the time of a step goes, by the device's own clock."""

import time

import pytest
import torch

from sloth_plugins.statistics.phases import Phases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_a_phase_is_as_long_as_the_device_works_on_it():
    cycles = 200_000_000
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(cycles)
    began.record()
    torch.cuda._sleep(cycles)
    ended.record()
    torch.cuda.synchronize()
    expected = began.elapsed_time(ended) / 1000
    found, at = Phases(torch.device("cuda")), time.perf_counter()
    found.enter("loss")
    torch.cuda._sleep(cycles)
    found.leave()
    assert time.perf_counter() - at < expected / 2  # the host has not waited
    assert found.read() == {"loss": pytest.approx(expected, rel=0.1)}
