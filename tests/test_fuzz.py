"""What reads foreign files holds against a few hundred of them, and the fuzzer can find a fault."""

import json
import os
import random

import pytest

from robustdm.errors import UsageError
from tests.fuzz import guard, mutate
from tests.fuzz.engine import Session, explore
from tests.fuzz.targets import TARGETS, Target

SLOW = ("diffusers", "report", "run")


@pytest.mark.filterwarnings("ignore")  # of libraries that meet nonsense
@pytest.mark.parametrize("name", TARGETS)
def test_readers_survive_foreign_files(name):
    with Session(TARGETS[name]()) as session:
        explore(session, seed=1, executions=80 if name in SLOW else 200, trace=False)
        assert not session.findings, "\n\n".join(session.findings.values())


class Planted(Target):
    """A reader with the faults that a fuzzer is for."""

    name = "planted"
    modules = ("test_fuzz.py",)
    slots = ("x.json",)
    files = {"x.json": b'{"a": 1, "b": [2, 3]}'}

    def __init__(self, fault):
        self.fault = fault

    def read(self, folder, slot):
        try:
            values = json.loads((folder / slot).read_bytes())
        except ValueError:
            raise UsageError("no JSON") from None
        if not isinstance(values, dict) or values.get("a") != 1:
            raise UsageError("no a")
        if not isinstance(values.get("b", []), list):
            self.fault(folder)


def _several_lines(folder):
    raise UsageError("one\ntwo")



def _spin(folder):
    while True:
        pass


FAULTS = {
    "error": (lambda folder: {}["b"], "KeyError in "),
    "lines": (_several_lines, "an error of several lines"),
    "outside": (lambda folder: open(folder.parent / "fuzz-outside", "w"), "touched what it must"),
    "program": (lambda folder: os.system("true"), "touched what it must not: os.system"),
    "time": (_spin, "Hang in "),
}


@pytest.mark.parametrize("fault, name", FAULTS.values(), ids=FAULTS)
def test_a_planted_fault_is_found_and_kept(tmp_path, monkeypatch, fault, name):
    monkeypatch.setattr(guard, "SECONDS", 0.2)
    with Session(Planted(fault), tmp_path) as session:
        explore(session, seed=0, executions=200)
    (found,) = session.findings
    assert found.startswith(name)
    assert session.report()["findings"] == [found] and session.report()["lines"] > 5
    again = Session(Planted(fault))
    again.run((tmp_path / "findings/01.bin").read_bytes())
    assert again.findings.keys() == {found}


def test_what_leads_somewhere_new_is_kept(tmp_path):
    with Session(Planted(lambda folder: None), tmp_path) as session:
        explore(session, seed=0, executions=300)
    kept = sorted((tmp_path / "corpus").iterdir())
    assert 1 <= len(kept) <= 5  # each of them reached a new line of `read`, which has ten
    assert Session(Planted(None), tmp_path).seeds()[1:] == [path.read_bytes() for path in kept]


def test_mutations_follow_from_the_seed():
    data = b"\0" + json.dumps({"a": [1, 2], "b": {"c": "x"}}).encode()

    def made(seed):
        draw = random.Random(seed)
        return [mutate.mutate(data, draw, [data, b"\1abc"]) for _ in range(200)]

    assert made(3) == made(3) != made(4)
    assert len(set(made(3))) > 150
