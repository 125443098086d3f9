"""A Lambda execution environment that starts, answers and charges as Lambda does.

It plays Lambda's APIs on loopback. The extension is started first and, when it has registered, the
function's runtime. Init ends when both ask for an event. An invocation goes to both at once. Its
caller has the answer when the function responds, and it is charged until both ask again.
"""

import contextlib
import http.client
import json
import os
import queue
import signal
import socketserver
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What the extension and the runtime do, as they tell Lambda by a request.
REGISTERS = "the extension registers"
EXTENSION_ASKS = "the extension asks for an event"
RUNTIME_ASKS = "the runtime asks for an invocation"
RESPONDS = "the function responds"

SECONDS = 60  # in which each of these must happen

EXTENSIONS_API = "/2020-01-01/extension"
RUNTIME_API = "/2018-06-01/runtime"
REQUEST_ID = "8476a536-e9f4-11e8-9739-2dfe598c3fcd"
FUNCTION_ARN = "arn:aws:lambda:eu-central-1:123456789012:function:function"
DEADLINE = 4102444800000  # in the year 2100, so never
INVOKE = {
    "eventType": "INVOKE",
    "deadlineMs": DEADLINE,
    "requestId": REQUEST_ID,
    "invokedFunctionArn": FUNCTION_ARN,
    "tracing": {"type": "X-Amzn-Trace-Id", "value": "Root=1-5f35ae12-0c0fec141ab77a00bc047aa2"},
}
SHUTDOWN = {"eventType": "SHUTDOWN", "shutdownReason": "spindown", "deadlineMs": DEADLINE}
INVOCATION_HEADERS = {
    "Lambda-Runtime-Aws-Request-Id": REQUEST_ID,
    "Lambda-Runtime-Deadline-Ms": DEADLINE,
    "Lambda-Runtime-Invoked-Function-Arn": FUNCTION_ARN,
}


class LambdaApis(socketserver.ThreadingTCPServer):
    """The Extensions API and the Runtime API, for one extension and one runtime."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Connection)
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.connections = 0
        self.events = queue.SimpleQueue()  # for the extension, each once
        self.invocations = queue.SimpleQueue()  # for the runtime, each once
        self.happened = queue.SimpleQueue()  # (what, when), when in seconds of time.perf_counter()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def response_to(self, method, path):
        """Returns the response to a request; waits for it where Lambda would."""
        now = time.perf_counter()
        if path == f"{EXTENSIONS_API}/register":
            self.happened.put((REGISTERS, now))
            return http_response(200, {}, {"Lambda-Extension-Identifier": REQUEST_ID})
        if path == f"{EXTENSIONS_API}/event/next":
            self.happened.put((EXTENSION_ASKS, now))
            return http_response(200, self.events.get())
        if path == f"{RUNTIME_API}/invocation/next":
            self.happened.put((RUNTIME_ASKS, now))
            return http_response(200, self.invocations.get(), INVOCATION_HEADERS)
        if path == f"{RUNTIME_API}/invocation/{REQUEST_ID}/response":
            self.happened.put((RESPONDS, now))
            return http_response(202)
        # Errors end the measurement. An extension must do without whatever else it asks for.
        if path.endswith("/error"):
            self.happened.put((f"{method} {path}", now))
        return http_response(202)


class _Connection(socketserver.StreamRequestHandler):
    """Reads the requests of one TCP connection, with little work, and sends the responses."""

    disable_nagle_algorithm = True

    def handle(self):
        assert isinstance(self.server, LambdaApis)
        self.server.connections += 1
        with contextlib.suppress(OSError):
            while request_line := self.rfile.readline():
                method, path, _ = request_line.decode().split()
                content_length = 0
                while (header := self.rfile.readline()) not in (b"\r\n", b""):
                    name, _, value = header.partition(b":")
                    if name.lower() == b"content-length":
                        content_length = int(value)
                self.rfile.read(content_length)
                self.wfile.write(self.server.response_to(method, path))


def http_response(status, body=None, headers=None):
    """Returns an HTTP response as bytes; the body is anything that JSON can hold."""
    content = json.dumps(body).encode()
    lines = [f"HTTP/1.1 {status} {http.client.responses[status]}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    lines += ["Content-Type: application/json", f"Content-Length: {len(content)}", "", ""]
    return "\r\n".join(lines).encode() + content


class CpuLimit:
    """A cgroup for processes that together get part of a core, or several."""

    # In microseconds. A task that needs more than its share of a period waits for the next one, so
    # with a long period its time depends much on when it begins. With a much shorter one processes
    # wait for each other, because Linux hands the share out in slices of 5,000.
    PERIOD = 50_000

    def __init__(self, name):
        root = Path("/sys/fs/cgroup")
        self._is_version_1 = (root / "cpu").is_dir()
        self._folder = (root / "cpu" if self._is_version_1 else root) / name
        self._folder.mkdir()
        self.members = self._folder / "cgroup.procs"

    def set(self, cores):
        """Limits the processes to so many cores from now on. Before, they may use all."""
        quota = round(cores * self.PERIOD)
        if self._is_version_1:
            (self._folder / "cpu.cfs_period_us").write_text(str(self.PERIOD))
            (self._folder / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (self._folder / "cpu.max").write_text(f"{quota} {self.PERIOD}")

    def kill(self):
        """Kills all processes, and removes the cgroup."""
        while pids := self.members.read_text().split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.01)
        self._folder.rmdir()


def is_running(pid, program):
    """Whether a process has become this program."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text() == f"{program}\n"


class Environment(contextlib.ExitStack):
    """An execution environment; a context manager. Raises SystemExit if what runs in it fails.

    opt is a folder that holds what /opt is to hold, task what /var/task would hold. The function's
    settings are environment variables, {name: value}.
    """

    def __init__(self, opt, task, settings):
        super().__init__()
        self._extensions = sorted((opt / "extensions").iterdir())
        self.apis = self.enter_context(LambdaApis())
        self.cpu = CpuLimit(f"benchmark-{os.getpid()}")
        self.callback(self.cpu.kill)
        self.processes = {}  # by name; when one has ended, so has the measurement
        self._log = self.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        # This Python comes first, itself, not as a shim such as pyenv's.
        path = f"{Path(sys.executable).resolve().parent}:{os.environ['PATH']}"
        self._variables = {
            "PATH": path,
            "AWS_LAMBDA_RUNTIME_API": self.apis.address,
            "LAMBDA_TASK_ROOT": str(task),
            **settings,
        }
        self._namespace = self._make_namespace(opt)

    def _make_namespace(self, opt):
        """Returns the path of a mount namespace in which /opt holds what the folder holds."""
        keeper = self.enter_context(
            subprocess.Popen(
                ["unshare", "--mount", ROOT / "scripts" / "mount-opt", opt, "sleep", "infinity"]
            )
        )
        self.callback(keeper.kill)
        while not is_running(keeper.pid, "sleep"):
            if keeper.poll() is not None:
                raise SystemExit(f"{opt} cannot be mounted on /opt; see above")
            time.sleep(0.005)
        return f"/proc/{keeper.pid}/ns/mnt"

    def _start(self, name, *command):
        into_cgroup = ["sh", "-c", 'echo $$ >"$0" && exec "$@"', self.cpu.members]
        self.processes[name] = subprocess.Popen(
            ["nsenter", f"--mount={self._namespace}", *into_cgroup, *command],
            env=self._variables,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            cwd="/",
        )

    def _start_extension(self):
        for extension in self._extensions:
            self._start("the extension", f"/opt/extensions/{extension.name}")

    def wait_until(self, *expected):
        """Waits until these things have happened; returns when each did, {what: when}."""
        times = {}
        end = time.monotonic() + SECONDS
        while missing := [what for what in expected if what not in times]:
            times |= self._what_happens_next()
            if time.monotonic() > end:
                self._fail(f"after {SECONDS} seconds, it still waits until {missing[0]}")
        return times

    def _what_happens_next(self):
        """Returns {what: when}; after a while without anything, checks that all still runs."""
        with contextlib.suppress(queue.Empty):
            what, when = self.apis.happened.get(timeout=0.5)
            return {what: when}
        for name, process in self.processes.items():
            if process.poll() is not None:
                self._fail(f"{name} ended with status {process.returncode}, instead of waiting")
        return {}

    def _fail(self, reason):
        self._log.seek(0)
        output = self._log.read().decode(errors="replace")
        raise SystemExit(f"{output}\nThe measurement failed: {reason}. The output is above.")

    def init(self):
        """Starts everything; returns how many milliseconds the init phase takes."""
        start = time.perf_counter()
        expected = [RUNTIME_ASKS]
        if self._extensions:
            self._start_extension()
            self.wait_until(REGISTERS)
            expected.append(EXTENSION_ASKS)
        entrypoint = ROOT / "lambda-entrypoint.sh"
        self._start("the runtime", entrypoint, "lambda_function.lambda_handler")
        times = self.wait_until(*expected)
        return (max(times.values()) - start) * 1e3

    def invoke(self):
        """Invokes the function; returns the milliseconds until its answer is there, and the
        milliseconds that are charged.
        """
        start = time.perf_counter()
        expected = [RESPONDS, RUNTIME_ASKS]
        if self._extensions:
            self.apis.events.put(INVOKE)
            expected.append(EXTENSION_ASKS)
        self.apis.invocations.put({})
        times = self.wait_until(*expected)
        return (times[RESPONDS] - start) * 1e3, (max(times.values()) - start) * 1e3

    def count_connections(self, events):
        """Runs the extension alone, for so many events; returns its number of TCP connections."""
        for _ in range(events):
            self.apis.events.put(INVOKE)
        self.apis.events.put(SHUTDOWN)
        self._start_extension()
        status = self.processes["the extension"].wait()
        if status != 0:
            self._fail(f"the extension ended with status {status}")
        return self.apis.connections
