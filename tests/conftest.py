"""How the tests run, and where their fixtures are."""

import collections
import os
import signal

import pytest

pytest_plugins = ["machine", "engine", "sample", "running", "extension_process", "rabbitmq"]

# A process in the background ignores these signals, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests that take long or need heavy tools")


def pytest_collection_modifyitems(config, items):
    slow = pytest.mark.skip(reason="take long or need heavy tools: ./tests/run.sh --all runs them")
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--all"):
            item.add_marker(slow)


def pytest_make_parametrize_id(val):
    """Names functions, whose default names differ between processes."""
    return getattr(val, "__name__", str(val)[:60])


def pytest_terminal_summary(terminalreporter):
    """Says in one line which tests were skipped."""
    skipped = terminalreporter.getreports("skipped")
    reasons = collections.Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.write_line("Skipped: " + "; ".join(f"{count} ({why})" for why, count in reasons.most_common()))


@pytest.fixture(scope="session", autouse=True)
def no_daemon():
    """Lets only the tests of the Daemon use it. The workers of pytest-xdist inherit the variable before."""
    os.environ.pop("LAMBDA_RUNTIME_API_DAEMON", None)
