"""Where the fixtures are, and what all tests need."""

import signal

pytest_plugins = ["machine", "engine", "sample", "running", "extension_process", "rabbitmq"]

# A process in the background, or of nohup, ignores these signals, and so would all that it starts.
for signum in signal.SIGINT, signal.SIGQUIT, signal.SIGHUP:
    signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)


def pytest_make_parametrize_id(val):
    """Names functions, whose default names differ between processes."""
    return getattr(val, "__name__", str(val)[:60])
