"""One name for all commands."""

import sys
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from robustdm import __main__ as console
from robustdm import cli

FOLDER = Path(console.__file__).parent


def test_every_command_is_listed():
    commands = {
        path.stem if path.parent == FOLDER else path.parent.name
        for path in (*FOLDER.glob("[a-z]*.py"), *FOLDER.glob("*/__main__.py"))
        if "\n    guard(main)\n" in path.read_text()
    }
    assert commands == set(console.COMMANDS)


@pytest.mark.parametrize("name", console.COMMANDS)
def test_a_command_gets_the_rest_of_the_line(monkeypatch, name):
    module = import_module(console._MODULES.get(name, f"robustdm.{name}"))
    seen = []
    monkeypatch.setattr(module, "main", lambda argv: seen.append(argv) or 3)
    assert console.main([name, "--out", "x"]) == 3 and seen == [["--out", "x"]]


@pytest.mark.parametrize("line", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(capsys, line):
    assert console.main(line) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in console.COMMANDS)


def test_an_unknown_command_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["robustdm", "tarin", "--steps", "3"])
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)
    with pytest.raises(SystemExit) as stop:
        console.run()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("error: command is 'tarin': choose one of train, ")


def test_the_script_is_installed():
    (script,) = entry_points(group="console_scripts", name="robustdm")
    assert script.load() is console.run
