"""Simulates a Lambda execution environment: how it starts, invokes, and measures what is billed.

It serves Lambda's APIs on loopback. The extension is started first and, when it has registered, the
function's runtime. Init ends when both have requested an event. An invocation goes to both at once,
and is billed until both have requested the next event.
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import fake_lambda  # noqa: E402

# What the extension and the runtime do, as their requests tell.
REGISTERS = "the extension registers"
EXTENSION_IS_FREE = "the extension requests an event"
RUNTIME_IS_FREE = "the runtime requests an invocation"

SECONDS = 60  # in which each of these must happen

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
    """Lambda's APIs for one extension and one runtime."""

    def __init__(self):
        self.events = queue.SimpleQueue()  # for the extension, each once
        self.invocations = queue.SimpleQueue()  # for the runtime, each once
        self.happened = queue.SimpleQueue()  # (what, when), when by time.perf_counter()
        super().__init__(
            events=[self._note_and_answer(EXTENSION_IS_FREE, self.events.get)],
            register=[self._note_and_answer(REGISTERS, lambda: fake_lambda.REGISTERED)],
        )
        self.answers["/runtime/invocation/next"] = [
            self._note_and_answer(RUNTIME_IS_FREE, self.invocations.get)
        ]
        self.answers[""] = [fake_lambda.ACCEPTED]  # responses of the function, and anything else

    def _note_and_answer(self, what, get_answer):
        def note_and_answer(connection):
            self.happened.put((what, time.perf_counter()))
            connection.sendall(get_answer())

        return note_and_answer


class Environment(contextlib.ExitStack):
    """An execution environment; a context manager. Raises SystemExit if what runs in it fails.

    opt and task are folders that hold what /opt and /var/task are to hold. Whoever creates it needs
    a mount namespace of its own. cpus is how many CPUs the environment has, start_ms how much CPU
    time function.py takes to start.
    """

    def __init__(self, opt, task, cpus, start_ms):
        super().__init__()
        subprocess.run(["mount", "--bind", opt, "/opt"], check=True)
        self.callback(subprocess.run, ["umount", "/opt"], check=True)
        self._extensions = sorted(Path("/opt/extensions").iterdir())
        self._bind_to_cpus = ["taskset", "--cpu-list", f"0-{cpus - 1}"]
        self.apis = self.enter_context(Lambda())
        self._log = self.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        self.processes = {}  # by name
        self._variables = {
            # This Python comes first, itself, not as a shim such as pyenv's.
            "PATH": f"{Path(sys.executable).resolve().parent}:{os.environ['PATH']}",
            "AWS_LAMBDA_RUNTIME_API": self.apis.address,
            "LAMBDA_TASK_ROOT": str(task),
            "START_MS": str(start_ms),
        }

    def _start(self, name, *command):
        process = subprocess.Popen(
            [*self._bind_to_cpus, *command],
            env=self._variables,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            cwd="/",
            start_new_session=True,
        )
        self.processes[name] = process
        self.callback(self._kill, process)

    def _kill(self, process):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def _start_extension(self):
        for extension in self._extensions:
            self._start("the extension", extension)

    def wait_until(self, *expected):
        """Waits until these things have happened; returns when the last one did."""
        times = {}
        end = time.monotonic() + SECONDS
        while missing := [what for what in expected if what not in times]:
            with contextlib.suppress(queue.Empty):
                what, when = self.apis.happened.get(timeout=0.5)
                times[what] = when
                continue
            for name, process in self.processes.items():
                if process.poll() is not None:
                    self._fail(f"{name} exited with status {process.returncode}")
            if time.monotonic() > end:
                self._fail(f"after {SECONDS} seconds, it still waits until {missing[0]}")
        return max(times.values())

    def _fail(self, reason):
        self._log.seek(0)
        output = self._log.read().decode(errors="replace")
        raise SystemExit(f"{output}\nThe measurement failed: {reason}. The output is above.")

    def init(self):
        """Starts everything; returns how many milliseconds init takes."""
        start = time.perf_counter()
        expected = [RUNTIME_IS_FREE]
        if self._extensions:
            self._start_extension()
            self.wait_until(REGISTERS)
            expected.append(EXTENSION_IS_FREE)
        self._start("the runtime", ROOT / "lambda-entrypoint.sh", "lambda_function.lambda_handler")
        return (self.wait_until(*expected) - start) * 1e3

    def invoke(self):
        """Invokes the function; returns how many milliseconds are billed."""
        start = time.perf_counter()
        expected = [RUNTIME_IS_FREE]
        if self._extensions:
            self.apis.events.put(INVOKE)
            expected.append(EXTENSION_IS_FREE)
        self.apis.invocations.put(INVOCATION)
        return (self.wait_until(*expected) - start) * 1e3

    def count_connections(self, events):
        """Runs the extension alone, for so many events; returns its number of TCP connections."""
        for _ in range(events):
            self.apis.events.put(INVOKE)
        self.apis.events.put(fake_lambda.SHUTDOWN)
        self._start_extension()
        status = self.processes["the extension"].wait()
        if status != 0:
            self._fail(f"the extension exited with status {status}")
        return self.apis.connections
