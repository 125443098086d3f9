"""Where the fixtures are, and what all tests need."""

import os
import signal

import pytest

pytest_plugins = [
    "machine",
    "sample",
    "engine",
    "running",
    "extension_process",
    "batching",
    "rabbitmq",
]

# A process that runs in the background, or under nohup, ignores these signals, and so would all
# that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def no_bytecode_beside_the_samples_sources():
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


def pytest_make_parametrize_id(val):
    """Gives each parameter a short name, the same in all processes of pytest-xdist."""
    if isinstance(val, bytes):
        val = val[:60]  # some are very long
    return getattr(val, "__name__", str(val)[:60])
