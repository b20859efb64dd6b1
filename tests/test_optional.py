"""Packages that need not be there."""

from __future__ import annotations

import sys

import pytest

from genkit import optional
from genkit.errors import GenkitError


def test_a_missing_optional_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open3d", None)
    with pytest.raises(GenkitError, match=r"open3d is not installed; pip install 'genkit-torch\[3d\]'"):
        optional.require("open3d")


def test_a_missing_system_library_names_the_debian_packages(tmp_path, monkeypatch):
    body = "raise OSError('libGL.so.1: cannot open shared object file')"
    (tmp_path / "open3d.py").write_text(body)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "open3d", raising=False)
    with pytest.raises(
        GenkitError, match=r"libGL\.so\.1.*apt-get install libusb-1\.0-0 libgl1 libegl1 libx11-6 libgomp1$"
    ):
        optional.require("open3d")


def test_an_optional_package_that_is_there_is_returned():
    assert optional.require("scipy").__name__ == "scipy"
