"""A pytest plugin: under `CI=true` a test that is skipped for an unexpected reason fails."""

import os
import re
from collections.abc import Generator

import pytest

EXPECTED = (
    r"torch and transformers are not installed",  # they stay out of the project's environment
    r"the extra `eval` is not installed",
    r"root may write to a read-only folder",
    r"a throw-away Slurm needs root|apt-get install slurm-wlm munge",  # .ci/run tries to install it
    r"only the trimmed golden set is there",
)
"""Reasons that a clean machine without accelerators has."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn an unexpected skip into a failure that names its reason."""
    report = yield
    if os.environ.get("CI") == "true" and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not re.search("|".join(EXPECTED), reason):
            report.outcome = "failed"
            report.longrepr = f"{reason}\nCI expects no such skip: see tests/skips.py."
    return report
