"""Every kernel compiles for every GPU generation, without spilling registers to memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).with_name("cubins.py")
ELEMENTWISE = ("noise_perturb", "fgsm_project", "equivariance_loss")


def compiled(tmp_path, *arguments):
    """Rows of the table for the kernels that the launch functions would launch."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = tmp_path / "table.json"
    command = [sys.executable, str(SCRIPT), "--json", str(out), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    return json.loads(out.read_text())


def check(rows, modules, architectures, dtypes):
    assert {r["case"].partition("/")[0] for r in rows} == set(modules)
    assert {r["case"].rpartition("/")[2] for r in rows} == set(dtypes)
    assert {r["arch"] for r in rows} == set(architectures)
    spilling = [r for r in rows if r["spills"]]
    assert not spilling, spilling
    # Three programs of four warps each fit a multiprocessor's 65,536 registers, or one of eight:
    # on sm_80, the compiler gives the resident forward with dropout up to 182.
    wide = [r for r in rows if r["registers"] > (184 if r["warps"] == 8 else 168)]
    assert not wide, wide


# What training launches. Only one kind of GPU and one dtype get all cases; the rest with --slow.
CORE = ("256px/", "equivariance_loss/256px-adv/")


@pytest.mark.parametrize("architecture, dtypes, cases", [
    (90, ("bf16",), [f"{module}/" for module in ELEMENTWISE]),
    (90, ("fp32", "fp16"), CORE), (80, ("bf16",), CORE), (100, ("bf16",), CORE),
])
def test_elementwise_kernels(tmp_path, architecture, dtypes, cases):
    rows = compiled(tmp_path, "--only", *cases, "--arch", str(architecture), "--dtype", *dtypes)
    check(rows, ELEMENTWISE, [architecture], dtypes)
    big = [r for r in rows if r["case"].startswith(("noise_perturb/256px/", "fgsm_project/256px/"))]
    # A thread moves 16 bytes at a time where memory is in the stream's order.
    assert big and all(r["stores"].startswith("16x") and r["loads"].startswith("16x") for r in big)


def test_a_regenerated_delta_beside_wide_gradients_spills_nothing(tmp_path):
    rows = compiled(tmp_path, "--only", "equivariance_loss/256px-ran", "--arch", "100", "--dtype",
                    "fp16")
    check(rows, ["equivariance_loss"], [100], ["fp16"])


def test_group_norm_kernels(tmp_path):
    rows = compiled(tmp_path, "--only", "group_norm_act/128x32x32", "--arch", "90", "--dtype",
                    "bf16")
    check(rows, ["group_norm_act"], [90], ["bf16"])


# Instructions per element, above which the kernels wait for these rather than for memory.
LIMITS = {"forward-plain": 18, "forward-add-dropout": 38, "backward-plain": 40,
          "backward-add-dropout": 50}


def test_instructions_of_the_group_norm_kernels(tmp_path):
    rows = compiled(tmp_path, "--slow", "--only",
                    *[f"group_norm_act/128x32x32-{case}" for case in LIMITS], "--dtype", "bf16")
    check(rows, ["group_norm_act"], [80, 90, 100], ["bf16"])
    found = {r["case"].split("/")[1].removeprefix("128x32x32-"): r["instr"] for r in rows
             if r["arch"] == 90}
    assert set(found) == set(LIMITS)
    if None in found.values():
        pytest.skip("no cuobjdump, neither on the path nor in triton: nothing can be counted")
    assert all(found[case] <= limit for case, limit in LIMITS.items()), found


@pytest.mark.slow
def test_all_kernels_for_all_gpus(tmp_path):
    check(compiled(tmp_path, "--slow"), (*ELEMENTWISE, "group_norm_act"), (80, 90, 100),
          ("fp32", "bf16", "fp16"))
