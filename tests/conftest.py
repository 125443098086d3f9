"""Where the fixtures are, and what all tests need."""

import os
import signal

import pytest

pytest_plugins = ["machine", "engine", "sample", "running", "extension_process", "rabbitmq"]

# A process in the background ignores these signals, and so would all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)


def pytest_make_parametrize_id(val):
    """Names functions, whose default names differ between processes."""
    return getattr(val, "__name__", str(val)[:60])


@pytest.fixture(scope="session", autouse=True)
def no_daemon():
    """Lets only the tests of the Daemon use it. The workers of pytest-xdist inherit the variable before."""
    os.environ.pop("LAMBDA_RUNTIME_API_DAEMON", None)
