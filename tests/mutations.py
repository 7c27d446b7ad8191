"""``python -m tests.mutations [NUMBER ...]``: small faults of the product, each caught by a test.

Every mutation changes one place of a copy of the project. Then the tests that are named beside it
run there, and must fail. The list was written before tests were cut: what it holds must still be
caught afterwards. Run it after a large change of the tests; it takes a quarter of an hour.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutation(NamedTuple):
    """A fault: in ``file``, the one place of ``before`` becomes ``after``."""

    file: str
    before: str
    after: str
    tests: str  # files below tests/, with -k and so on


def _m(file: str, before: str, after: str, tests: str) -> Mutation:
    return Mutation(f"robustdm/{file}", before, after, tests)


MUTATIONS = (
    # The ops: sign, factor, projection, gradient, random stream, rounding.
    _m("ops/reference.py", "(radius * INVERSE_SQRT3) * sign", "-(radius * INVERSE_SQRT3) * sign",
       "test_ops.py -k fgsm"),
    _m("ops/reference.py", "torch.minimum(torch.maximum(moved, -radius), radius).to", "moved.to",
       "test_ops.py -k fgsm"),
    _m("ops/reference.py", "residual = residual - delta.to(work)",
       "residual = residual + delta.to(work)", "test_ops.py -k loss"),
    _m("ops/reference.py", "error if detach_clean else error - pull",
       "error if detach_clean else error + pull", "test_ops.py -k loss"),
    _m("ops/reference.py", "radius = ray + gamma * beta / noise", "radius = ray + gamma / noise",
       "test_ops.py test_objectives.py -k 'scale or draw or radius'"),
    _m("ops/stream.py", "_ROUNDS = 10", "_ROUNDS = 9", "test_random.py"),
    _m("ops/checks.py", "not bool((radius >= 0).all())", "False", "test_ops.py"),
    Mutation("kernels/fgsm_project.py",
             "moved = tl.minimum(moved, limit, propagate_nan=tl.PropagateNan.ALL)", "pass",
             "test_ops.py -k fgsm"),
    Mutation("kernels/equivariance_loss.py", "slope = error - pull", "slope = error + pull",
             "test_ops.py -k loss"),
    Mutation("kernels/group_norm_act.py", "- a[None, :] - v * q[None, :]",
             "+ a[None, :] - v * q[None, :]", "test_group_norm_act.py"),
    Mutation("csrc/at_ops_cpu.cpp", "radius * 0.5773502691896258f", "radius",
             "test_native.py test_ops.py -k fgsm"),
    # The method.
    _m("method/perturbation.py", "return self.lam * math.sqrt(3) / scale",
       "return self.lam * 3 / scale", "test_perturbation.py"),
    _m("method/schedule.py", "(u + 0.008) / 1.008", "(u + 0.08) / 1.08", "test_schedule.py"),
    _m("method/schedule.py", "return (xt - noise * eps) /", "return (xt + noise * eps) /",
       "test_schedule.py"),
    _m("method/objectives.py", "weight = self.reg_every * size / count", "weight = size / count",
       "test_objectives.py test_closed_form.py"),
    _m("method/objectives.py", "number, seed = 0 if self.share_dropout else number, draw",
       "number, seed = number, draw",
       "test_objectives.py test_fuse.py"),
    _m("method/sampling.py", "np.linspace(0, total - 1, steps)", "np.linspace(0, total - 2, steps)",
       "test_sampling.py"),
    _m("method/sampling.py", "max(0.0, 1 - before - std**2)", "max(0.0, 1 - before)",
       "test_sampling.py"),
    _m("method/sampling.py", "if k == len(self) - 1:\n            return mean",
       "if k == len(self):\n            return mean", "test_sampling.py"),
    _m("method/sampling.py", "index = element_index(samples.start, ", "index = element_index(0, ",
       "test_sampling.py"),
    _m("method/trajectory_attack.py", ".clamp(-sigma, sigma)", "", "test_attacks.py"),
    _m("method/baselines.py", "y = x * (a2 / a)", "y = x * (a / a2)", "test_baselines.py"),
    # Training.
    _m("training/optimizer.py", "count += 1 - skipped", "count += 1", "test_optimizer.py"),
    _m("training/optimizer.py", "(1 + step) / (10 + step)", "step / (10 + step)",
       "test_optimizer.py"),
    _m("training/optimizer.py", "        for ema in averages:\n            ema.update()\n", "",
       "test_optimizer.py"),
    _m("training/parallel.py", "dtype = grads[0].dtype\n            loss = loss / self._ranks.size",
       "dtype = grads[0].dtype", "test_distributed.py -k two_ranks"),
    _m("training/trainer.py", "first = len(x0) * self.ranks.size, len(x0) * self.ranks.rank",
       "first = len(x0) * self.ranks.size, 0", "test_distributed.py -k two_ranks"),
    _m("training/step_metrics.py", "taken = 1 - skipped", "taken = 1 - 0 * skipped",
       "test_trainer.py -k window"),
    _m("training/signals.py", "else 128 + received", "else received", "test_rundir.py"),
    # Runs: what is saved is what is loaded.
    _m("runs/checkpoint.py", 'if hashlib.sha256(data).hexdigest() != entry["sha256"]:',
       "if False:", "test_checkpoint.py"),
    _m("runs/checkpoint.py", "        os.rename(staging, final)\n        published = True",
       "        shutil.copytree(staging, final)\n        published = True", "test_checkpoint.py"),
    _m("runs/rundir.py", 'if line["step"] <= step]', 'if line["step"] <= step + 1]',
       "test_rundir.py"),
    _m("models/lora.py", "adapters[layer + _B].flatten(1) @ a.flatten(1)",
       "2 * adapters[layer + _B].flatten(1) @ a.flatten(1)", "test_lora.py"),
    # Data.
    _m("data/corruption.py", "philox(self.seed, 0, index, Stream.CORRUPT_NOISE)",
       "philox(self.seed, 1, index, Stream.CORRUPT_NOISE)", "test_data.py test_corruption.py"),
    _m("data/corruption.py", "torch.where(uniform(hit) < self.pixels, speck, clean)",
       "torch.where(uniform(hit) > self.pixels, speck, clean)", "test_corruption.py"),
    _m("data/decode.py", 'Image.new("RGBA", image.size, "white")',
       'Image.new("RGBA", image.size, "black")', "test_data_images.py"),
    # Metrics, verdicts, pages.
    _m("metrics/frechet.py", "(distance - 2 * overlap)", "(distance - overlap)",
       "test_feature_metrics.py"),
    _m("metrics/kernel.py", "values.fill_diagonal_(0)", "pass", "test_feature_metrics.py"),
    _m("studies/claims.py", "if lower <= low and high <= upper:",
       "if lower <= high and low <= upper:", "test_studies.py -k 'claim or judge or interval'"),
    _m("untrusted.py", "if size > max(_HARMLESS,", "if size > 99 * max(_HARMLESS,",
       "test_untrusted.py test_feature_metrics.py"),
)


def mutated(mutation: Mutation, place: Path) -> None:
    """Copy the project to ``place`` with the fault in it.

    Raises:
        LookupError: unless the place of the fault is there, once.
    """
    skipped = shutil.ignore_patterns(".git", "__pycache__", "results", "*.egg-info", ".*_cache")
    shutil.copytree(ROOT, place, ignore=skipped, symlinks=True)
    file = place / mutation.file
    text = file.read_text()
    if mutation.file.startswith("csrc/"):
        text = text.replace(mutation.before, mutation.after)
    elif text.count(mutation.before) != 1:
        raise LookupError(f"{mutation.file} has {mutation.before!r} {text.count(mutation.before)} "
                          "times: it must be there once")
    file.write_text(text.replace(mutation.before, mutation.after))


def caught(mutation: Mutation) -> bool:
    """Whether the tests fail on the project with the fault."""
    import shlex

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "project")
        mutated(mutation, place)
        environment = os.environ | {"PYTHONPATH": str(place)}
        if mutation.file.startswith("csrc/"):
            subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace", "--force"],
                           cwd=place, check=True, env=environment, capture_output=True)
        names = [f"tests/{word}" if word.endswith(".py") else word
                 for word in shlex.split(mutation.tests)]
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:xdist",
                               "-p", "no:cacheprovider", *names], cwd=place, env=environment,
                              capture_output=True, text=True)
        if done.returncode not in (0, 1):
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        return done.returncode == 1


def main() -> int:
    """Try the mutations that the command line numbers, or all; returns 1 if one is missed."""
    numbers = [int(word) for word in sys.argv[1:]] or range(1, len(MUTATIONS) + 1)
    missed = []
    for number in numbers:
        mutation, begin = MUTATIONS[number - 1], time.monotonic()
        found = caught(mutation)
        missed += [] if found else [number]
        print(f"{number:3} {'caught' if found else 'MISSED'} {time.monotonic() - begin:4.0f} s  "
              f"{mutation.file}: {mutation.before.strip().splitlines()[0]}", flush=True)
    print(f"{len(numbers) - len(missed)} of {len(numbers)} caught")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
