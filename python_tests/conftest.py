"""Shared settings of the tests: two threads, slow tests on request, seeds, no silent skips where a GPU is promised."""

import os

import pytest
import torch

# Of a GPU test, where PYSPARSE_REQUIRE_GPU=1 promises a GPU and kernels: what may be missing all the same.
MAY_BE_MISSING = ("slow: ", "one CUDA device only", "CuPy is not installed")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Fail a GPU test that is skipped under PYSPARSE_REQUIRE_GPU=1: a run of nothing but skips has tested nothing."""
    report = yield
    if (
        os.environ.get("PYSPARSE_REQUIRE_GPU", "0") in ("", "0")
        or not report.skipped
        or "gpu" not in item.keywords
    ):
        return report
    reason = report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
    if not hasattr(report, "wasxfail") and not reason.startswith(MAY_BE_MISSING):
        report.outcome, report.longrepr = "failed", f"skipped although PYSPARSE_REQUIRE_GPU is set: {reason}"
    return report


def pytest_configure(config):
    torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
