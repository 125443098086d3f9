"""A Lambda execution environment that starts, answers and charges as Lambda does.

It plays Lambda's APIs on loopback. The extension is started first and, when it has registered, the
function's runtime. Init ends when both ask for an event. An invocation goes to both at once. Its
caller has the answer when the function responds, and it is charged until both ask again.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fake_lambda

ROOT = Path(__file__).resolve().parents[1]

# What the extension and the runtime do, as they tell Lambda by a request.
REGISTERS = "the extension registers"
EXTENSION_ASKS = "the extension asks for an event"
RUNTIME_ASKS = "the runtime asks for an invocation"
RESPONDS = "the function responds"

SECONDS = 60  # in which each of these must happen

# A shell's code: shows the folder $0 as /opt, and becomes a command.
SHOW_OPT = 'mount --bind "$0" /opt && exec "$@"'

# The invocation of which the runtime is told; its ID is in the path of the response.
REQUEST_ID = "8476a536-e9f4-11e8-9739-2dfe598c3fcd"
FUNCTION_ARN = "arn:aws:lambda:eu-central-1:123456789012:function:function"
INVOKE = fake_lambda.answer(
    body={
        "eventType": "INVOKE",
        "deadlineMs": fake_lambda.IN_THE_YEAR_2100,
        "requestId": REQUEST_ID,
        "invokedFunctionArn": FUNCTION_ARN,
        "tracing": {"type": "X-Amzn-Trace-Id", "value": "Root=1-5f35ae12-0c0fec141ab77a00bc047aa2"},
    }
)
INVOCATION = fake_lambda.answer(
    body={},
    Lambda_Runtime_Aws_Request_Id=REQUEST_ID,
    Lambda_Runtime_Deadline_Ms=fake_lambda.IN_THE_YEAR_2100,
    Lambda_Runtime_Invoked_Function_Arn=FUNCTION_ARN,
)


class Lambda(fake_lambda.FakeLambda):
    """Lambda for one extension and one runtime, which it tells nothing until it is asked to."""

    def __init__(self):
        self.events = queue.SimpleQueue()  # for the extension, each once
        self.invocations = queue.SimpleQueue()  # for the runtime, each once
        self.happened = queue.SimpleQueue()  # (what, when), when in seconds of time.perf_counter()
        super().__init__(
            events=[self._tells(EXTENSION_ASKS, self.events.get)],
            register=[self._tells(REGISTERS, lambda: fake_lambda.REGISTERED)],
        )
        self.answers |= {
            "/runtime/invocation/next": [self._tells(RUNTIME_ASKS, self.invocations.get)],
            f"/invocation/{REQUEST_ID}/response": [
                self._tells(RESPONDS, lambda: fake_lambda.ACCEPTED)
            ],
            "": [fake_lambda.ACCEPTED],  # an extension must do without whatever else it asks for
        }

    def _tells(self, what, get_answer):
        """An answer that says what has happened, and waits where Lambda would."""

        def tell(connection):
            self.happened.put((what, time.perf_counter()))
            connection.sendall(get_answer())

        return tell


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
        self.apis = self.enter_context(Lambda())
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
            subprocess.Popen(["unshare", "--mount", "sh", "-c", SHOW_OPT, opt, "sleep", "infinity"])
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
        self.apis.invocations.put(INVOCATION)
        times = self.wait_until(*expected)
        return (times[RESPONDS] - start) * 1e3, (max(times.values()) - start) * 1e3

    def count_connections(self, events):
        """Runs the extension alone, for so many events; returns its number of TCP connections."""
        for _ in range(events):
            self.apis.events.put(INVOKE)
        self.apis.events.put(fake_lambda.SHUTDOWN)
        self._start_extension()
        status = self.processes["the extension"].wait()
        if status != 0:
            self._fail(f"the extension ended with status {status}")
        return self.apis.connections
