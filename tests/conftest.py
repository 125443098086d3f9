"""Where the fixtures are, and what all tests need."""

import signal

pytest_plugins = ["machine", "engine", "sample", "running", "extension_process", "rabbitmq"]

# A process that runs in the background, or under nohup, ignores these signals, and so would all
# that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_make_parametrize_id(val):
    """Names parameters, functions by their own names: pytest's differ between processes."""
    return getattr(val, "__name__", str(val)[:60])
