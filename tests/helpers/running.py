"""The sample while it runs, in each way to run it."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess

from installation import locked
from machine import LoggedProcess, free_port, need_namespaces, post, run, wait_until
from sample import NAME


class Running(LoggedProcess):
    """The sample while it runs."""

    def __init__(self, command, host, port, **options):
        self.port, self.endpoint = port, f"http://{host}:{port}"
        super().__init__(command, **options)

    @property
    def received(self):
        """The request IDs of the INVOKE events that the extension has logged so far."""
        line = r'(?m)^\[\S+\] .*"INVOKE".*"requestId": "([^"]+)"'
        return re.findall(line, self.output)

    @property
    def container(self):
        """The ID of the container, or an empty string without one."""
        return run("docker", "ps", "-q", "--filter", f"publish={self.port}").stdout.strip()

    def invoke(self, event=None, function="function", timeout=60, **headers):
        """Invokes the function with that event.

        Returns its answer, from JSON, or as text if it is not JSON.
        """
        url = f"{self.endpoint}/2015-03-31/functions/{function}/invocations"
        answer = post(url, json.dumps(event or {}).encode(), timeout, **headers).decode()
        try:
            return json.loads(answer)
        except ValueError:
            return answer

    def wait_until_ready(self):
        """Waits until the endpoint answers, which takes a while in a first run."""

        def answers():
            assert self.poll() is None, self.output
            with contextlib.suppress(OSError, http.client.HTTPException):
                return post(self.endpoint, timeout=5) is not None

        wait_until(answers, 600)

    def stop(self, signum=signal.SIGTERM):
        """Ends the run as a supervisor or, with another signal, a terminal would.

        Returns its exit status.
        """
        os.kill(self.pid if signum == signal.SIGTERM else -self.pid, signum)
        return self.wait(60)

    def assert_signal_ends_it(self, signum=signal.SIGTERM):
        """Asserts that the signal ends the run with 0, and the extension with SHUTDOWN."""
        assert self.stop(signum) == 0
        assert '"eventType": "SHUTDOWN"' in self.output


@contextlib.contextmanager
def running(
    sample,
    *arguments,
    command=None,
    host="127.0.0.1",
    port=None,
    cwd="/",
    wait=True,
    **environment,
):
    """Runs python-example-extension.sh until it answers, then lets the caller use it.

    The script, or the command that starts it, runs in a session of its own.
    """
    if "--docker" not in arguments:
        need_namespaces()
    port = port or free_port()
    place = port if host == "127.0.0.1" else f"{host}:{port}"
    words = [*(command or [sample / f"{NAME}.sh"]), "-p", place, *arguments]
    options = {
        "cwd": cwd,
        "stdin": subprocess.DEVNULL,
        "start_new_session": True,
        "env": os.environ | environment,
    }
    lock = contextlib.ExitStack()
    if wait and "--no-docker" not in arguments:
        # All copies build an image of one name: one at a time, until it runs what it has built.
        lock.enter_context(locked("docker"))
    with lock, Running(words, host, port, **options) as process:
        try:
            if wait:
                process.wait_until_ready()
            lock.close()
            yield process
        finally:
            if process.poll() is None:
                process.stop()
            print(process.output)


class WayToRun:
    """A way to run the sample: call it with a copy, and further arguments of running()."""

    def __init__(self, option, host_name, **environment):
        self.option, self.environment = option, environment
        self.host_name = host_name  # how what runs that way calls this machine

    def __call__(self, sample, *arguments, **more):
        return running(sample, self.option, *arguments, **self.environment | more)
