"""Compile every Triton kernel for GPUs that this machine does not have, and print what it takes.

    python tests/cubins.py [--slow] [--only WORD ...] [--json FILE] [--keep FOLDER]

The launch functions run on tensors of the "meta" device with each kernel replaced by a recorder;
what they would have launched is compiled as Triton's own launcher would have it: types of pointers,
integers that are one or divisible by 16, constants, number of warps. TRITON_INTERPRET must be off.
To add a kernel module, add a line to MODULES.

"instr" is what a thread of a normalisation kernel executes, in instructions per element, counted in
the machine code: where memory would allow more, the kernel waits for these. It takes cuobjdump.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if "TRITON_CACHE_DIR" not in os.environ:
    cache = tempfile.TemporaryDirectory(prefix="cubins-")  # goes when the program ends
    os.environ["TRITON_CACHE_DIR"] = cache.name
os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # a cached kernel has no log
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16",
    torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32", torch.uint8: "*u8",
    torch.int8: "*i8", torch.bool: "*i1",
}
CIFAR, LSUN, POINTS = (128, 3, 32, 32), (32, 3, 256, 256), (4096, 3)

# What a case is: its name, whether it is in the default run, and a call of a launch function.
Case = tuple[str, bool, Callable[[], Any]]


def images(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = True) -> torch.Tensor:
    x = torch.empty(shape, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last) if channels_last and len(shape) == 4 else x


def vectors(batch: int) -> torch.Tensor:
    return torch.empty(batch, device="meta")


KEY = torch.empty(3, dtype=torch.int64, device="meta")
# The default run has the format and size of training; other layouts and small sizes are slow.
LAYOUTS = (
    ("32px", CIFAR, True, False), ("256px", LSUN, True, True), ("256px-nchw", LSUN, False, False),
    ("points", POINTS, False, False),
)


def noise_perturb(module, dtype: torch.dtype) -> Iterator[Case]:
    for name, shape, layout, default in LAYOUTS:
        v = vectors(shape[0])
        yield name, default, lambda shape=shape, layout=layout, v=v: (
            module.noise_perturb(images(shape, dtype, layout), v, v, v, KEY, dtype)
        )
    half = dtype != torch.float32
    yield "256px-from-fp32", half, lambda: (
        module.noise_perturb(images(LSUN, torch.float32), *[vectors(32)] * 3, KEY, dtype)
    )


def fgsm_project(module, dtype: torch.dtype) -> Iterator[Case]:
    for name, shape, layout, default in LAYOUTS:
        v = vectors(shape[0])
        for outward in (False, True):
            def call(shape=shape, layout=layout, v=v, outward=outward):
                x = images(shape, dtype, layout)
                module.fgsm_project(x, None if outward else x, v, v, KEY)

            yield name + ("-outward" if outward else ""), default, call


def equivariance_loss(module, dtype: torch.dtype) -> Iterator[Case]:
    variants = {
        "ddpm": (False, False, False, False), "adv": (True, True, False, False),
        "ran": (True, False, False, False), "invariance": (True, False, True, False),
        "detach": (True, True, False, True),
    }
    for name, shape, layout, default in LAYOUTS:
        v = vectors(shape[0])
        for variant, (adversarial, stored, invariance, detach) in variants.items():
            def call(shape=shape, layout=layout, v=v, adversarial=adversarial, stored=stored,
                     invariance=invariance, detach=detach):
                x = images(shape, dtype, layout)
                module.equivariance_loss(
                    x, x if adversarial else None, x if stored else None, v, v, KEY, dtype,
                    invariance, detach,
                )

            yield f"{name}-{variant}", default, call


def group_norm_act(module, dtype: torch.dtype) -> Iterator[Case]:
    for name, shape, default in (
        ("128x32x32", (128, 128, 32, 32), True), ("384x32x32", (128, 384, 32, 32), False),
        ("384x16x16", (128, 384, 16, 16), False), ("512x8x8", (128, 512, 8, 8), False),
        ("128x256x256", (32, 128, 256, 256), True),
    ):
        batch, channels = shape[:2]
        x = images(shape, dtype)
        w, a = vectors(channels), torch.empty(batch, channels, dtype=dtype, device="meta")
        stats = torch.empty(batch, 32, device="meta")
        keep = torch.empty(batch, x[0, 0].numel(), channels // 8, dtype=torch.uint8, device="meta")
        # scale, shift, add; rate of dropout
        for variant, given, rate in (
            ("plain", (None, None, None), 0.0), ("add-dropout", (None, None, a), 0.1),
            ("full", (a, a, a), 0.1),
        ):
            def forward(x=x, w=w, given=given, rate=rate):
                module.group_norm_act_forward(x, 32, w, w, *given, True, rate, KEY, 0, 1e-5)

            def backward(x=x, w=w, given=given, rate=rate, stats=stats, keep=keep):
                module.group_norm_act_backward(
                    x, x, keep, stats, stats, 32, w, w, *given, True, rate, KEY, 0, True
                )

            yield f"{name}-forward-{variant}", default and variant == "full", forward
            yield f"{name}-backward-{variant}", default and variant == "full", backward


MODULES = {
    "noise_perturb": noise_perturb,
    "fgsm_project": fgsm_project,
    "equivariance_loss": equivariance_loss,
    "group_norm_act": group_norm_act,
}


class Recorder:
    """Stands for a kernel, and notes its launches instead of making them."""

    def __init__(self, kernel, launches: list):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.launches.append((self.kernel, grid, args, kwargs))

        return launch


def record(module, call: Callable[[], Any]) -> list:
    """The launches (kernel, grid, args, kwargs) that ``call`` makes of a module's own kernels."""
    from triton.runtime.jit import JITFunction

    launches: list = []
    kernels = {k: v for k, v in vars(module).items() if isinstance(v, JITFunction)}
    for name, kernel in kernels.items():
        setattr(module, name, Recorder(kernel, launches))
    try:
        call()
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)
    return launches


def specialise(parameter, value) -> tuple[str, int | None]:
    """Type and divisor that Triton's launcher would find for an argument."""
    fixed = parameter.do_not_specialize
    if parameter.is_constexpr or value is None:
        return "constexpr", None
    if isinstance(value, torch.Tensor):
        aligned = value.data_ptr() % 16 == 0 and not parameter.do_not_specialize_on_alignment
        return POINTERS[value.dtype], 16 if aligned and not fixed else None
    if isinstance(value, bool):
        return "u1", None
    if isinstance(value, float):
        return "fp32", None
    if value == 1 and not fixed:
        return "constexpr", None
    kind = "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
    return kind, 16 if value % 16 == 0 and not fixed else None


def source_of(launch) -> tuple[Any, dict, dict, dict, dict]:
    """Kernel, signature, constants, attributes and options of a recorded launch."""
    kernel, _, args, kwargs = launch
    values = dict(zip(kernel.arg_names, args, strict=False))
    values.update({k: v for k, v in kwargs.items() if k in kernel.arg_names})
    options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values.get(parameter.name, parameter.default)
        signature[parameter.name], divisor = specialise(parameter, value)
        if signature[parameter.name] == "constexpr":
            constants[(i,)] = value
        elif divisor:
            attributes[(i,)] = [["tt.divisibility", divisor]]
    return kernel, signature, constants, attributes, options


def widths(ptx: str, operation: str) -> str:
    """Bytes that single instructions move: "16x2 2x1" is two of 16 bytes and one of two."""
    counts: dict[int, int] = {}
    for line in re.findall(rf"\b{operation}\.global[.\w:]*", ptx):
        vector = re.search(r"\.v([248])", line)
        bits = int(re.search(r"\.[bfusd](\d+)$", line).group(1))
        size = (int(vector.group(1)) if vector else 1) * bits // 8
        counts[size] = counts.get(size, 0) + 1
    return " ".join(f"{size}x{n}" for size, n in sorted(counts.items(), reverse=True)) or "-"


def disassembler() -> str | None:
    """Path of cuobjdump: the one on the path, else the one that Triton brings."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or (str(bundled) if bundled.exists() else None)


def executed(sass: str, trips: int) -> int:
    """Instructions that a thread executes: a loop's body ``trips`` times, all others once.

    Code behind the end of the program (slow paths of divisions and roots) is left out; branches
    forward count as not taken.
    """
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/ +(.*?);", sass)]
    end = next(at for at, text in code if text.split() == ["EXIT"])
    code = [(at, text) for at, text in code if at <= end]
    branches = [(at, re.search(r"\bBRA\S* .*?(0x[0-9a-f]+)", text)) for at, text in code]
    loops = [(int(b.group(1), 16), at) for at, b in branches if b and int(b.group(1), 16) <= at]
    times = [trips ** sum(first <= at <= last for first, last in loops) for at, _ in code]
    return sum(times)


def per_element(cubin: bytes, constants: dict[str, Any], warps: int) -> float | None:
    """Instructions per element of a normalisation kernel; None for others, and untold."""
    tool = disassembler()
    if tool is None or "SLAB" not in constants:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        done = subprocess.run([tool, "-sass", str(path)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} -sass failed: {done.stderr[-500:]}")
    rows = constants.get("LENGTH", constants["HW"])
    channels = constants["SLAB"] * constants["C"] // constants["GROUPS"]
    count = executed(done.stdout, -(-rows // constants["ROWS"]))
    return round(count * 32 * warps / (rows * channels), 1)


def measure(source, architecture: int) -> dict:
    """Compile what `source_of` returned: a row of the table, and the assembly."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, signature, constants, attributes, options = source
    what, stdout = ASTSource(function, signature, constants, attributes), io.StringIO()
    with contextlib.redirect_stdout(stdout):
        kernel = triton.compile(what, GPUTarget("cuda", architecture, 32), options)
    log = stdout.getvalue()
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise RuntimeError(f"ptxas reported nothing on {function.__name__}: {log!r}")
    return {
        "kernel": function.__name__,
        "arch": architecture,
        "warps": kernel.metadata.num_warps,
        "registers": int(registers.group(1)),
        "spills": int(spills.group(1)) + int(spills.group(2)),
        "shared": kernel.metadata.shared,
        "instr": per_element(
            kernel.asm["cubin"],
            {function.params[i].name: value for (i,), value in constants.items()},
            kernel.metadata.num_warps,
        ),
        "loads": widths(kernel.asm["ptx"], "ld"),
        "stores": widths(kernel.asm["ptx"], "st"),
        "asm": kernel.asm,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--slow", action="store_true", help="all cases, not the chosen ones")
    parser.add_argument("--only", nargs="*", default=[""],
                        help="cases whose module/case name contains one of these")
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--json", type=Path, help="write the table there as well")
    parser.add_argument("--keep", type=Path, help="write PTX and cubins there")
    options = parser.parse_args()

    folder = Path(__file__).resolve().parents[1] / "kernels"
    columns = ("kernel", "arch", "warps", "registers", "spills", "shared", "instr", "loads",
               "stores")
    sizes = (34, 5, 6, 10, 7, 7, 7, 14, 14)
    print(f"{'case':48}" + "".join(f"{c:{n}}" for c, n in zip(columns, sizes, strict=True)))
    rows = []
    for name, cases in MODULES.items():
        if not (folder / f"{name}.py").exists():
            continue
        module = importlib.import_module(f"robustdm.kernels.{name}")
        for kind in options.dtype:
            for case, default, call in cases(module, DTYPES[kind]):
                title = f"{name}/{case}/{kind}"
                chosen = any(word in title for word in options.only)
                if not chosen or not (default or options.slow):
                    continue
                # A batch in chunks launches the same kernel over and over.
                sources = {str(s): s for s in map(source_of, record(module, call))}
                for source in sources.values():
                    for architecture in options.arch:
                        row = {"case": title, **measure(source, architecture)}
                        asm = row.pop("asm")
                        if options.keep:
                            stem = f"{title.replace('/', '-')}-{row['kernel']}-sm{architecture}"
                            options.keep.mkdir(parents=True, exist_ok=True)
                            for end in ("ptx", "ttgir"):
                                (options.keep / f"{stem}.{end}").write_text(asm[end])
                            (options.keep / f"{stem}.cubin").write_bytes(asm["cubin"])
                        rows.append(row)
                        print(f"{title:48}" + "".join(
                            f"{row[c]!s:{n}}" for c, n in zip(columns, sizes, strict=True)
                        ), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
