"""In CI only tests that tests/skips.py expects may skip."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

def test_unexpected():
    pytest.skip("the moon is full")

@pytest.mark.skipif(True, reason="no golden values at all")
def test_unexpected_by_mark():
    pass

def test_absent_module():
    pytest.importorskip("no_such_module")

def test_expected():
    pytest.skip("the extra `eval` is not installed")

@pytest.mark.xfail
def test_known_to_fail():
    raise ValueError
"""


@pytest.mark.parametrize(("ci", "outcomes"), [("true", "2 failed, 1 skipped, 1 xfailed, 1 error"),
                                              ("", "4 skipped, 1 xfailed")])  # fmt: skip
def test_unexpected_skips_fail_and_are_named_in_ci_alone(tmp_path, ci, outcomes):
    (tmp_path / "test_some.py").write_text(TESTS)
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "skips", "-p", "no:jaxtyping", "-rf", "."],
        cwd=tmp_path,
        env=os.environ | {"CI": ci, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
    )
    assert outcomes in ran.stdout
    assert ran.returncode == (1 if ci else 0)
    for reason in ("the moon is full", "no golden values at all", "no_such_module"):
        assert (reason in ran.stdout) == bool(ci)
