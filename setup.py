"""Builds the C++ and CUDA libraries from csrc/; all metadata is in pyproject.toml.

The libraries have a plain C interface, hence need neither PyTorch to be built nor a certain version
of it to run. Whatever cannot be built is left out: the package works without. The reason is printed
and kept beside the libraries (`robustdm.ops.native.status` reads it), since pip hides output.
"""

import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
HEADERS = ["csrc/philox.h", "csrc/philox_lanes.h", "csrc/cpu.h", "csrc/adamw_ema.h"]
LIBRARIES = {
    "cpu": ["csrc/at_ops_cpu.cpp", "csrc/group_norm_cpu.cpp", "csrc/adamw_ema_cpu.cpp"],
    "cuda": ["csrc/adamw_ema.cu"],
}
# Contraction to fused multiply-adds would change numbers that all backends must agree on.
CXX_FLAGS = [
    "-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-w",
]
CONTRACTED = {"csrc/group_norm_cpu.cpp"}  # no other backend has its bits anyway
VARIANTS = {"base": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    VARIANTS["avx2"] = ["-mavx2", "-mfma"]
    VARIANTS["avx512"] = [
        "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512",
    ]
ARCHITECTURES = ("80", "90", "100")


class Unavailable(Exception):
    """A library cannot be built; the text says why, in one line."""


def call(*command) -> str:
    try:
        done = subprocess.run([*map(str, command)], cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        said = next((line for line in lines if "error" in line.lower()), *lines[-1:] or ["no word"])
        raise Unavailable(f"{command[0]} failed with exit code {done.returncode}: {said.strip()}")
    return done.stdout


def build_cpu(sources: list[str], target: Path, folder: Path) -> None:
    found = filter(None, map(shutil.which, ("g++", "clang++", "c++")))
    compiler = os.environ.get("CXX", "").split() or [next(found, None)]
    if not compiler[0]:
        raise Unavailable("no C++ compiler: neither g++ nor clang++ is on PATH, and CXX is not set")

    def compile_one(job) -> Path:
        source, (name, flags) = job
        out = folder / f"{Path(source).stem}.{name}.o"
        flags = [*flags, "-ffp-contract=fast"] if source in CONTRACTED else flags
        call(*compiler, *CXX_FLAGS, *flags, f"-DROBUSTDM_VARIANT={name}", "-c", source, "-o", out)
        return out

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [(source, variant) for source in sources for variant in VARIANTS.items()]
        objects = list(pool.map(compile_one, jobs))
    call(*compiler, "-shared", *objects, "-o", target, "-lm")


def build_cuda(sources: list[str], target: Path, folder: Path) -> None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if not nvcc:
        raise Unavailable("no nvcc on PATH or under CUDA_HOME")
    known = call(nvcc, "--list-gpu-arch").split()
    chosen = [a for a in ARCHITECTURES if f"compute_{a}" in known]
    if not chosen:
        raise Unavailable(f"{nvcc} compiles for none of sm_{', sm_'.join(ARCHITECTURES)}")
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in chosen]
    codes.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")  # later GPUs
    call(nvcc, "-std=c++17", "-O3", "--fmad=false", "--threads=0", "-cudart=static", *codes,
         "-Xcompiler=-fPIC,-fvisibility=hidden", "-shared", *sources, "-o", target)


class BuildLibraries(build_ext):
    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        folder = (ROOT if in_place else Path(self.build_lib).resolve()) / "robustdm" / "_native"
        folder.mkdir(parents=True, exist_ok=True)
        for name, sources in LIBRARIES.items():
            target, reason = folder / f"librobustdm_{name}.so", folder / f"{name}.txt"
            newest = max((ROOT / f).stat().st_mtime for f in (*sources, *HEADERS, "setup.py"))
            if not self.force and target.exists() and target.stat().st_mtime > newest:
                continue
            build = build_cpu if name == "cpu" else build_cuda
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch, target.name)
                try:
                    build(sources, made, Path(scratch))
                    os.replace(made, target)
                    reason.unlink(missing_ok=True)
                except (Unavailable, OSError) as error:
                    target.unlink(missing_ok=True)
                    reason.write_text(f"{error}\n")
                    print(f"robustdm: the {name} library is off: {error}")

    def get_outputs(self) -> list[str]:
        return []


extensions = [
    Extension(f"robustdm._native.{name}", sources, depends=HEADERS)
    for name, sources in LIBRARIES.items()
]
setup(ext_modules=extensions, cmdclass={"build_ext": BuildLibraries})
