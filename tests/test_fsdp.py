"""Ranks that hold parts of a network train what ranks do that hold all of it."""

import torch.distributed.fsdp  # noqa: F401  before ranks are forked
import json
import os
import signal
from collections import Counter
from dataclasses import replace

import pytest
import ranks
import torch
from test_distributed import TINY, UNET, assert_equal, go, tiny, weights
from torch.utils._python_dispatch import TorchDispatchMode

import robustdm.training.checkpoint as checkpoint
import robustdm.training.trainer as trainer_module
from robustdm.data import batches
from robustdm.distributed import join, whole
from robustdm.errors import UsageError
from robustdm.sharded import blocks
from robustdm.training.checkpoint import load_newest
from robustdm.training.config import TrainConfig
from robustdm.training.trainer import Trainer

ATTENDS = UNET | dict(attention_resolutions=(8,), dropout=0.0, flip=False)


def fsdp(path, base=TINY, **changes):
    return tiny(path, base, parallel="fsdp", **changes)


def everything(trainer):
    """Weights, averages and moments, whole."""
    return {f"{file}/{name}": whole(value).tolist()
            for file, group in trainer.state()[0].items() for name, value in group.items()}


class Sent(TorchDispatchMode):
    """Counts what the ranks send each other."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.calls[function._schema.name.removeprefix("c10d::")] += 1
        return function(*args, **(kwargs or {}))


def double_steps(rank, config, count):
    """What `count` steps in float64 lead to, and what is sent in each."""
    real = trainer_module.build_model
    trainer_module.build_model = lambda *arguments: real(*arguments).double()
    Trainer._bits = lambda self: 0  # of float32
    with join("cpu", 0.5) as found:
        trainer = Trainer(config, ranks=found)
        trainer._record = lambda *_: None  # of float32
        stream = batches(trainer.data, config, 0, trainer.device, found)
        sent = []
        for _ in range(count):
            x0 = next(stream)[0]
            x0 = x0.load(trainer._key(trainer.step)) if not isinstance(x0, torch.Tensor) else x0
            with Sent() as counted:
                trainer.train_step(x0.double())
            sent.append(dict(counted.calls))
        return everything(trainer), sent, len(list(blocks(trainer.model)))
