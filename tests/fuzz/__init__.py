"""Fuzzing of all that reads a file somebody else may have written: see ``python -m tests.fuzz``.

    mutate.py    inputs made from inputs
    guard.py     what a reader may do: raise our own errors, within seconds, a gigabyte, its folder
    engine.py    which inputs lead somewhere new: by atheris where it is installed, else by tracing
    targets.py   the readers, and tiny valid files for each

An input is one byte that chooses which of the target's files to replace, and that file's content.
"""
