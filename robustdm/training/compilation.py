"""torch.compile for the network, with a way back where it cannot work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def compile_network(model: nn.Module, probe: Callable[[], object]) -> str | None:
    """Compile a network in place, so that its parameters keep their names.

    Args:
        model: the network.
        probe: runs the network once in the way training will; compiles everything it needs.

    Returns:
        None on success, else the reason (one line) why the network runs eagerly.
    """
    model.compile(dynamic=False)
    try:
        probe()
    except Exception as error:
        # No compiler, no Triton, an untraceable module: eager mode trains just the same. An error
        # that is not the compiler's comes back in the first eager step.
        model._compiled_call_impl = None
        torch._dynamo.reset()
        text = str(error).strip().splitlines() or [type(error).__name__]
        return f"{type(error).__name__}: {text[0][:200]}"
    finally:
        model.zero_grad(set_to_none=True)
    return None
