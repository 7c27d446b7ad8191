"""The whole training step, optimizer included, as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustdm.models.compilation import reason_of

WARM_UPS = 2
"""Plain steps before a capture, in which libraries choose algorithms and buffers are made."""


class StepGraph:
    """A step that is replayed from the GPU's memory, so that the host launches one thing, not
    thousands.

    There is a graph for every shape of batch and kind of step. The first calls of each run the step
    as it is (they count: they are steps like all others), the next captures it. Where that fails,
    steps go on as they are.

    Args:
        run: ``run(x0, key, regularised)`` does the step with nothing but operations of the device:
            whatever changes from step to step it reads from tensors that stay where they are.
        warn: told, in one line, why a step could not be captured.
    """

    def __init__(self, run: Callable[[Tensor, Tensor, bool], None], warn: Callable[[str], None]):
        self._run, self._warn = run, warn
        self._works = True
        self._kinds: dict[tuple, _Kind] = {}
        self._side: torch.cuda.Stream | None = None  # each new one would cache memory of its own
        self._pool: tuple | None = None  # one pool for all graphs: they never run at once

    @property
    def captured(self) -> bool:
        """Whether a graph was captured and none failed."""
        return self._works and any(kind.graph is not None for kind in self._kinds.values())

    def __call__(self, x0: Tensor, key: Tensor, regularised: bool) -> None:
        """Do a step; arguments as those of ``run``."""
        if not self._works:
            self._run(x0, key, regularised)
            return
        name = (tuple(x0.shape), regularised)
        if name not in self._kinds:
            self._kinds[name] = _Kind(x0, key)
        kind = self._kinds[name]
        kind.load(x0, key)
        kind.calls += 1
        if kind.graph is None and kind.calls > WARM_UPS:
            try:
                kind.graph = self._capture(kind, regularised)
            except Exception as error:
                # An error that is not the capture's comes back at once, in the plain step.
                self._works, self._kinds = False, {}
                self._warn(f"no CUDA graph, the step runs without ({reason_of(error)})")
                self._run(x0, key, regularised)
                return
        if kind.graph is not None:
            kind.graph.replay()
            return
        if self._side is None:
            self._side = torch.cuda.Stream()
        side = self._side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # the stream that a capture would use
            self._run(kind.x0, kind.key, regularised)
        torch.cuda.current_stream().wait_stream(side)

    def _capture(self, kind: _Kind, regularised: bool) -> torch.cuda.CUDAGraph:
        """Record a step; this does not run it."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._run(kind.x0, kind.key, regularised)
        return graph


class _Kind:
    """Inputs at fixed addresses, and the graph that reads them."""

    def __init__(self, x0: Tensor, key: Tensor):
        self.x0 = x0.clone()
        self.key = key.clone()
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def load(self, x0: Tensor, key: Tensor) -> None:
        self.x0.copy_(x0)
        self.key.copy_(key)
