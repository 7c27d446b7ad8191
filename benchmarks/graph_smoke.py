"""Eight training steps, eager against replayed as a CUDA graph: the same losses, or something is
wrong with the graph. Prints one JSON object.

    python benchmarks/graph_smoke.py [--device cuda]

On a CPU both are eager, which only tries the program itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from robustdm.data import batches
from robustdm.data.base import ImageTensor
from robustdm.runs.config import TrainConfig
from robustdm.training.trainer import Trainer

STEPS = 8
SMALL = dict(resolution=32, block_channels=(64, 128), attention_resolutions=(16,), norm_groups=32,
             batch_size=32)
SMALLEST = dict(resolution=8, block_channels=(8,), norm_groups=4, batch_size=4)


def losses(device: str, precision: str, graph: bool, tiny: bool) -> dict:
    """Losses of the first steps of an adversarial training on random images, with dropout."""
    generator = torch.Generator().manual_seed(0)
    fields = SMALLEST if tiny else SMALL
    side = fields["resolution"]
    images = torch.randint(0, 256, (512, 3, side, side), dtype=torch.uint8, generator=generator)
    config = TrainConfig.from_dict(dict(
        fields, data="images", layers_per_block=1, dropout=0.1, warmup_steps=0, lr=1e-4,
        precision=precision, device=device, objective="robust_adv"))
    trainer = Trainer(config, ImageTensor("random", images, None, 0.0, 0))
    warned: list[str] = []
    if graph:
        trainer.use_cuda_graph(warned.append)
    stream, found = batches(trainer.data, config, 0, trainer.device), []
    for _ in range(STEPS):
        trainer.train_step(next(stream)[0])
        found.append(trainer.window().get("loss"))
    return {"losses": found, "warned": warned, "skipped": int(trainer.metrics.skipped),
            "replayed": trainer.replays_graph}


def compare(device: str, precision: str, tiny: bool = False) -> dict:
    """The losses with and without a graph, and the largest relative difference."""
    eager, graph = (losses(device, precision, graph, tiny) for graph in (False, True))
    difference = max(abs(a / b - 1) for a, b in zip(graph["losses"], eager["losses"], strict=True))
    return {"eager": eager, "graph": graph, "difference": difference,
            "replayed": graph["replayed"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    # TF32 would round what the two runs compute alike, in algorithms that may differ.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    found = {precision: compare(options.device, precision, options.tiny)
             for precision in ("fp32", "bf16")}
    found["replayed"] = all(found[p]["replayed"] for p in ("fp32", "bf16"))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
