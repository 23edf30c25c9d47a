"""What a task says when a package of an extra is missing."""

import sys

import pytest

from golden.errors import InputError
from golden.extras import import_extra, install_command


def test_a_missing_package_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert import_extra("json", "reading", "any").loads("1") == 1
    monkeypatch.setitem(sys.modules, "wavedrom", None)
    with pytest.raises(InputError) as caught:
        import_extra("wavedrom", "drawing", "datasheet")
    assert str(caught.value) == (
        "drawing needs the Python package 'wavedrom'; install the datasheet extra: "
        "pip install -c constraints.txt 'scaled-outer-product[datasheet]'"
    )
    assert install_command("datasheet", "sim").endswith("'scaled-outer-product[datasheet,sim]'")
