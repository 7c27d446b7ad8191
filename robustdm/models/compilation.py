"""torch.compile for the step or the network, with a way back where it cannot work."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import nn

from robustdm.method.gradients import GradientStep


def compile_step(step: GradientStep, probe: Callable[[], object]) -> str | None:
    """Compile a whole step, see `GradientStep.compile`.

    Args:
        step: what to compile.
        probe: runs the step once in every way that training will.

    Returns:
        None on success, else the reason (one line) why the step runs eagerly.
    """
    try:
        step.compile()
        probe()
    except Exception as error:  # see compile_network
        step.eager()
        torch._dynamo.reset()
        return reason_of(error)
    return None


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
        return reason_of(error)
    finally:
        model.zero_grad(set_to_none=True)
    return None


def reason_of(error: Exception) -> str:
    """An error in one line; of a graph break, with the line of code that it lies at."""
    lines = str(error).strip().splitlines() or [""]
    text = f"{type(error).__name__}: {lines[0][:200]}"
    places = re.findall(r'File "([^"]+)", line (\d+)', str(error).partition("from user code")[2])
    if places:
        text += " at {}:{}".format(*places[-1])
    return text
