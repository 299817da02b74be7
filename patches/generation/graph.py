"""A decoding step as one CUDA graph: a launch for each token, where the host would need thousands."""

import functools
from collections.abc import Callable

import torch

from ..kernels.notices import say_once


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one for all captures: cuBLAS keeps a workspace for each stream that it has seen."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's


def captured(step: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph | None:
    """The graph of a step that has run before with these shapes; None, and a line that says so, where that fails.

    Nothing is computed while it is captured. It reads and writes the tensors that the step has, where they lie now.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        stream = _stream(device)
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    step()
                finally:
                    graph.capture_end()
        except RuntimeError as error:
            say_once(f"generation: steps are launched one by one, because no graph was made ({error!s:.200})", "graph")
            return None
        current.wait_stream(stream)
    return graph
