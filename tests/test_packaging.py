"""What installing and importing the package pulls in, and what the README promises."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torchvision", "datasets", "lmdb", "xformers", "torch_fidelity")


def python(code, *path, **environment):
    paths = os.pathsep.join([*map(str, path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_optional_packages_are_never_imported_by_the_core(tmp_path):
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    modules = [
        "robustdm", "robustdm.train", "robustdm.sample", "robustdm.report", "robustdm.reproduce",
        "robustdm.training.loop", "robustdm.method.objectives", "robustdm.data",
        "robustdm.method.sampling", "robustdm.models.inference",
    ]
    loaded = python(
        f"import sys\nimport {', '.join(modules)}\n"
        "print(*(n for n in sys.modules if n.partition('.')[0] in "
        f"{(*HEAVY, 'diffusers')!r}))",
        tmp_path,
    )
    assert loaded.strip() == ""


def test_the_package_itself_is_lazy():
    out = python(
        "import sys, robustdm\n"
        "print('torch' in sys.modules)\n"
        "robustdm.NoiseSchedule.linear(10)\n"
        "print('torch' in sys.modules)\n"
        "print(all(hasattr(robustdm, n) for n in robustdm.__all__))\n"
    )
    assert out.split() == ["False", "True", "True"]


@pytest.mark.parametrize("entry", [
    "train", "sample", "report", "reproduce", "plan", "attack", "evaluate", "memorise", "steps",
    "convert",
])
def test_help_needs_no_torch(entry):
    out = python(
        "import sys\n"
        f"from robustdm.{entry} import main\n"
        f"sys.argv = ['robustdm.{entry}', '--help']\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    print('code', stop.code)\n"
        "print('torch', 'torch' in sys.modules)\n"
    )
    assert "usage: python -m robustdm." + entry in out
    assert "code 0" in out and "torch False" in out


WINGS = (
    "errors", "flags", "device", "host", "untrusted", "distributed", "ops", "method", "metrics",
    "runs", "models", "reporting", "data", "evaluation", "training", "studies", "cli",
)
"""Lowest first: every import within the package goes down this list; commands stand above it."""


def module_names():
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "robustdm").rglob("*.py")
    }


def imports_of(path):
    """The modules that a file imports anywhere in it; of a package, whose name is imported."""
    modules = module_names()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in modules else node.module


def test_imports_go_down_the_wings():
    found = set()
    for path in (ROOT / "robustdm").rglob("*.py"):
        own = path.relative_to(ROOT / "robustdm").with_suffix("").parts
        command = own[-1] == "__main__" or (len(own) == 1 and own[0] not in WINGS)
        for module in imports_of(path):
            root, _, inner = module.partition(".")
            assert root not in ("tests", "benchmarks", "torchvision"), f"{path} imports {module}"
            if root != "robustdm" or not inner:
                continue
            wing = inner.partition(".")[0]
            if own[0] == "kernels" or wing == "kernels":  # the Triton half of the ops
                assert own[0] in ("kernels", "ops"), f"{path} imports {module}"
                continue
            assert wing in WINGS, f"{path} imports the command {module}"
            found.add(wing)
            if not command:
                assert WINGS.index(wing) <= WINGS.index(own[0]), f"{path} imports {module}"
    assert found == set(WINGS)  # no name that stands for nothing


def test_no_circle_of_imports():
    """Within a wing, too: each module can be read after those that it imports."""
    modules = module_names()
    below = {
        name: {found for found in imports_of(path) if found in modules and found != name}
        for name, path in modules.items()
    }
    tuple(TopologicalSorter(below).static_order())  # CycleError names the circle


def test_every_package_is_installed():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(settings["tool"]["setuptools"]["packages"])
    found = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "robustdm").rglob("__init__.py")
    }
    # The kernels have no __init__.py: `kernels` in the root must not pass for the package of that
    # name, which diffusers looks for.
    assert listed == found | {"robustdm.kernels"} and not (ROOT / "kernels/__init__.py").exists()
    (pattern,) = settings["tool"]["setuptools"]["package-data"]["robustdm.reporting"]
    templates = set((ROOT / "robustdm/reporting").glob(pattern))
    assert templates and templates == set((ROOT / "robustdm").rglob("*.j2"))


def test_the_readme_starts_with_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    first_screen = "\n".join(readme.splitlines()[:40])
    assert "\npip install -e . && python -m robustdm.train\n" in first_screen
    assert '\npip install -e ".[test]" && pytest ' in first_screen


@pytest.mark.parametrize("name", ["README.md", "SECURITY.md", *sorted(
    str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))])
def test_documents_name_only_what_exists(name):
    """Every module, preset, flag and file that their commands and links use is there."""
    from robustdm.runs.config import TrainConfig
    from robustdm.runs.presets import PRESETS

    text = (ROOT / name).read_text()
    for module, rest in re.findall(r"python -m robustdm\.?([.\w]*)([^`\n]*)", text):
        path = ROOT / "robustdm" / Path(*module.split("."))
        assert path.with_suffix(".py").exists() or path.is_dir(), module
        module = f"{module}.__main__" if module and path.is_dir() else module
        entry = importlib.import_module(f"robustdm.{module}" if module else "robustdm")
        configs = [v for k, v in vars(entry).items()
                   if k.endswith("Config") and v is not TrainConfig]
        fields = TrainConfig if module == "train" else configs[0] if configs else None
        for flag in set(re.findall(r"--([\w-]+)", rest)) - {"help"}:
            assert fields and flag.removeprefix("no-").replace("-", "_") in (
                fields.__dataclass_fields__), f"{module} --{flag}"
        if module == "reproduce" and re.match(r" [a-z]", rest):
            assert rest.split()[0] in entry.STUDIES, rest
    for preset in re.findall(r"--preset ([\w-]+)", text):
        assert preset in PRESETS or "|" in preset, preset
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / name).parent / target).exists(), target


def test_the_limits_that_security_states_are_those_of_the_code():
    from PIL import Image

    from robustdm import untrusted
    from robustdm.data import cifar, decode
    from robustdm.models import pretrained
    from robustdm.runs import checkpoint, fields

    text = " ".join((ROOT / "SECURITY.md").read_text().split())
    data = " ".join((ROOT / "docs/data.md").read_text().split())
    limit = f"more than {untrusted._RATIO} times its size (above {untrusted._HARMLESS >> 20} MiB)"
    assert limit in data
    for words, value in (
        ("most {} million pixels", Image.MAX_IMAGE_PIXELS // 10**6),
        ("more than {} million are decoded one at a time", decode._LARGE // 10**6),
        ("a row {} MiB", decode.MAX_PACKED >> 20), ("aliases, {} KiB", fields.YAML_LIMIT >> 10),
        ("unpacks to {} times its size", untrusted._RATIO),
        ("(above {} MiB)", untrusted._HARMLESS >> 20),
        ("manifest and a model's JSON have at most {} MiB", checkpoint._MANIFEST_LIMIT >> 20),
        ("manifest and a model's JSON have at most {} MiB", pretrained._JSON_LIMIT >> 20),
        ("header in an archive {} KiB", cifar._MOST_DESCRIPTION >> 10),
        ("a few times {} MiB", cifar._MOST_BYTES >> 20),
        ("out of {} million operations", cifar._MOST_OPCODES >> 20),
        ("header of a safetensors file {} MiB", untrusted._HEADER_LIMIT >> 20),
    ):
        assert words.format(value) in text, words


def test_no_file_holds_two_versions_of_a_merge():
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("no git here")
    for name in filter(None, names.stdout.split("\0")):
        path = ROOT / name
        if path.suffix in (".py", ".md", ".toml", ".json", ".h", ".cpp", ".cu") and path.is_file():
            lines = path.read_text(encoding="utf-8").splitlines()
            assert not [n for n in lines if n.startswith(("<" * 7 + " ", ">" * 7 + " "))], name
