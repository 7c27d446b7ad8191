"""``python benchmarks/calls.py``: how much Python one training step of the digits runs.

Counts, in the package alone, the calls of Python functions, the switches from one file to another,
and the distinct files and lines. What these cost is seen in the step ladder; a step that nobody
can follow is seen here.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import robustdm  # noqa: E402
from robustdm.runs.config import TrainConfig  # noqa: E402
from robustdm.training.trainer import Trainer  # noqa: E402

PACKAGE = str(Path(robustdm.__file__).parent)


def count(work) -> dict[str, int]:
    """What a call of ``work`` runs in the package.

    Returns:
        ``calls``, ``switches`` between files, ``files`` and ``lines``.
    """
    calls = switches = 0
    last, lines = None, set()

    def local(frame, event, _):
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def watch(frame, event, _):
        nonlocal calls, switches, last
        file = frame.f_code.co_filename
        if not file.startswith(PACKAGE):
            return None
        calls += 1
        switches += last not in (None, file)
        last = file
        return local

    sys.settrace(watch)
    try:
        work()
    finally:
        sys.settrace(None)
    return {"calls": calls, "switches": switches, "files": len({file for file, _ in lines}),
            "lines": len(lines)}


def main() -> None:
    """Print the counts of one step, after a few that fill caches."""
    torch.manual_seed(0)
    trainer = Trainer(TrainConfig(device="cpu"))
    x0 = trainer.data.batch(torch.arange(trainer.config.batch_size))
    for _ in range(3):
        trainer.train_step(x0)
    for name, value in count(lambda: trainer.train_step(x0)).items():
        print(f"{name:<9} {value:,}")


if __name__ == "__main__":
    main()
