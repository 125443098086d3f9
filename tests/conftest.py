"""Where the fixtures are, and what all tests need."""

import os
import signal

import pytest

pytest_plugins = ["machine", "engine", "sample", "running", "extension_process", "rabbitmq"]

# A process that runs in the background, or under nohup, ignores these signals, and so would all
# that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def no_bytecode_beside_the_samples_sources():
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keeps in one process of pytest-xdist the tests of a file that share a copy of the sample.

    They also share what the copy installs, builds and runs. All others go to any process.
    """
    for item in items:
        if "sample" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


def pytest_make_parametrize_id(val):
    """Names parameters, functions by their own names: pytest's differ between processes."""
    return getattr(val, "__name__", str(val)[:60])
