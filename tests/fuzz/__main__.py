"""Look for files that make a reader do what it must not.

    python -m tests.fuzz zip --minutes 10
    python -m tests.fuzz all --minutes 2 --seed 7

Inputs that lead somewhere new, and faults (the input, and what happened), go to --out. Exit code 1:
there are faults.
"""

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

NAMES = ("arrays", "checkpoint", "cifar", "config", "diffusers", "images", "improved", "report",
         "resume", "run", "zip")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=[*NAMES, "all"])
    parser.add_argument("--minutes", type=float, default=10,
                        help="of the processor, for each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"))
    parser.add_argument("--engine", choices=["atheris", "trace"],
                        help="atheris where it is installed, else the tracing of lines")
    options = parser.parse_args()
    if options.target == "all":
        codes = [subprocess.call([sys.executable, "-m", "tests.fuzz", *(
            name if word == "all" else word for word in sys.argv[1:])]) for name in NAMES]
        return int(any(codes))
    os.environ["OMP_NUM_THREADS"] = "1"
    engine = options.engine or (
        "atheris" if importlib.util.find_spec("atheris") else "trace")
    instrument = contextlib.nullcontext()
    if engine == "atheris":
        import atheris

        instrument = atheris.instrument_imports(include=["robustdm", "zipfile"])
    with instrument:
        from .targets import TARGETS
    from .engine import main as run

    run(TARGETS[options.target], 60 * options.minutes, options.seed,
        options.out / options.target, engine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
