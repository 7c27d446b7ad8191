"""A broken installation is one line that names the package at fault."""

import pytest

from robustdm.errors import UsageError, importing


@pytest.mark.parametrize("inner, said", [
    ("raise RuntimeError('operator inner::nms does not exist')", "operator inner::nms does not"),
    ("raise ImportError('undefined symbol: _ZN3')\n", "undefined symbol: _ZN3"),
    ("import inner_is_not_there", "No module named 'inner_is_not_there'"),
])
def test_the_package_at_fault_is_named(tmp_path, monkeypatch, inner, said):
    outer = "try:\n    import {0}\nexcept Exception as error:\n    raise RuntimeError('see above') "
    name = f"inner_{abs(hash(said))}"
    (tmp_path / f"{name}.py").write_text(inner)
    (tmp_path / f"outer_{name}.py").write_text(outer.format(name) + "from error\n")
    monkeypatch.syspath_prepend(tmp_path)
    broken = name if inner.startswith("raise") else "inner_is_not_there"
    with pytest.raises(UsageError) as caught, importing("outer"):
        __import__(f"outer_{name}")
    text = str(caught.value)
    assert text.startswith(f"outer cannot be imported, for {broken} is broken here ({said}")
    assert f"install the {broken} that fits this torch" in text and "\n" not in text


def test_what_can_be_imported_is():
    with importing("json"):
        import json
    assert json.dumps(1) == "1"
