"""The extension as a process, with an Extensions API that the test controls."""

import json
import os
import re
import signal

import pytest
from extension_process import run_to_end, started, variant
from fake_lambda import (
    IDENTIFIER,
    REGISTERED,
    SHUTDOWN,
    FakeLambda,
    ScriptedServer,
    answer,
    invoke_event,
)
from machine import ROOT, path_with, run, wait_until
from pages import PAGES, code_blocks
from sample import NAME

# Logs the modules that have been imported.
LOG_MODULES = "log('Modules: ' + json.dumps(sorted(sys.modules)))"


def logged_modules(stdout):
    """The modules at each moment when LOG_MODULES ran, as sets."""
    return [{*json.loads(text)} for text in re.findall(r"\] Modules: (.*)", stdout)]


def test_the_readmes_code_is_a_whole_extension(extension, tmp_path):
    code = re.search(r"(?s)```python\n(.*?)```", PAGES["README.md"]).group(1)
    readme = variant(extension, tmp_path, {"extension.py": code})
    with FakeLambda([invoke_event(), SHUTDOWN]) as api, started(readme, api) as process:
        assert process.wait(60) == 0
        assert process.err == ""
        assert process.received == ["INVOKE", "SHUTDOWN"]


def test_the_readmes_way_to_catch_an_exception_works(extension, tmp_path):
    """In this test, the bug is that nothing defines your_code."""
    (block,) = [
        code for code in code_blocks("README.md", "Make it your own", "python") if "except" in code
    ]
    code = f"from lifecycle import log\n\ndef process(event):\n{block}"
    caught = variant(extension, tmp_path, {"extension.py": code})
    with FakeLambda([invoke_event(), SHUTDOWN]) as api:
        status, stdout, _ = run_to_end(caught, api)
    assert status == 0
    assert stdout.count("] Not processed: NameError(") == 2


def test_registers_by_name_and_requests_events_by_identifier(extension):
    with FakeLambda([invoke_event(), invoke_event(), SHUTDOWN]) as api:
        status, stdout, stderr = run_to_end(extension, api)
    assert (status, stderr) == (0, "")
    assert f"[{NAME}] Registered with ID: {IDENTIFIER}\n" in stdout
    registration, *requests = api.requests
    assert (registration.method, registration.path) == ("POST", "/2020-01-01/extension/register")
    assert registration.headers["Lambda-Extension-Name"] == NAME
    assert registration.headers["Content-Type"] == "application/json"
    assert registration.json == {"events": ["INVOKE", "SHUTDOWN"]}
    requested = [
        (request.method, request.path, request.headers["Lambda-Extension-Identifier"])
        for request in requests
    ]
    assert requested == [("GET", "/2020-01-01/extension/event/next", IDENTIFIER)] * 3


@pytest.mark.parametrize(
    ("initialization_type", "events"),
    [
        ("on-demand", ["INVOKE", "SHUTDOWN"]),
        ("provisioned-concurrency", ["INVOKE", "SHUTDOWN"]),
        ("snap-start", ["INVOKE", "SHUTDOWN"]),
        ("lambda-managed-instances", ["SHUTDOWN"]),  # which refuse INVOKE
    ],
)
def test_registers_for_the_events_that_lambda_sends(extension, initialization_type, events):
    with FakeLambda([SHUTDOWN]) as api:
        environment = {"AWS_LAMBDA_INITIALIZATION_TYPE": initialization_type}
        status, _, _ = run_to_end(extension, api, **environment)
    assert status == 0
    assert api.requests_for("register")[0].json == {"events": events}


def test_registers_before_it_imports_extension_py(scripted):
    """Lambda starts the function's runtime only when the extension has registered."""
    logged = []

    def register(connection):
        logged.append(process.out)
        connection.sendall(REGISTERED)

    with (
        FakeLambda([SHUTDOWN], register=[register]) as api,
        started(scripted, api, AT_IMPORT=LOG_MODULES, AT_INIT=LOG_MODULES) as process,
    ):
        assert process.wait(60) == 0
        assert logged == [""]
        in_import, in_init = logged_modules(process.out)
    assert "requests" not in in_import  # the session is opened later
    assert "requests" in in_init


def test_requests_the_first_event_after_init(scripted):
    """Lambda sends no invocation before all extensions have requested an event."""
    logged = []

    def first_event(connection):
        logged.extend(re.findall("Registered|Imported|Initialized|SHUTDOWN", process.out))
        connection.sendall(SHUTDOWN)

    code = {"AT_IMPORT": "log('Imported')", "AT_INIT": "log('Initialized')"}
    with FakeLambda([first_event]) as api, started(scripted, api, **code) as process:
        assert process.wait(60) == 0
    assert logged == ["Registered", "Imported", "Initialized"]


def test_imports_nothing_during_an_invocation(scripted):
    """An import during an invocation would make its caller wait."""
    events = [invoke_event(do=LOG_MODULES), invoke_event(do=LOG_MODULES), SHUTDOWN]
    with FakeLambda(events) as api:
        _, stdout, _ = run_to_end(scripted, api, AT_INIT=LOG_MODULES)
    in_init, in_first, in_second = logged_modules(stdout)
    assert in_init >= {"requests", "http.client"}
    assert in_first == in_second


def test_one_session_requests_all_events(scripted):
    """So there are two connections; only the second one is the requests library's."""
    with FakeLambda([*[invoke_event()] * 1000, SHUTDOWN]) as api:
        status, _, stderr = run_to_end(scripted, api)
        assert (status, stderr) == (0, "")
        assert api.connections == 2
    registration, *requests = api.requests
    assert "User-Agent" not in registration.headers
    assert all(request.headers["User-Agent"].startswith("python-urllib3") for request in requests)


def test_waits_for_an_event_without_a_timeout(scripted):
    """Lambda may freeze it for hours. Here each socket logs its timeout."""
    log_timeouts = "socket.socket.settimeout = lambda self, limit: log(f'timeout: {limit}')"
    with FakeLambda([invoke_event(), SHUTDOWN]) as api:
        _, stdout, _ = run_to_end(scripted, api, AT_INIT=f"import socket; {log_timeouts}")
    assert {*re.findall("timeout: (.*)", stdout)} == {"None"}


def test_output_is_unbuffered_and_accepts_any_text(scripted):
    code = r"log('half a character: \ud83e'); print('printed'); time.sleep(60)"
    with FakeLambda([invoke_event(do=code)]) as api, started(scripted, api) as process:
        wait_until(lambda: "printed\n" in process.out, 30)  # before the code has ended
        assert f"[{NAME}] half a character: \\ud83e\n" in process.out


def test_lines_of_several_threads_do_not_mix(scripted):
    with FakeLambda([SHUTDOWN]) as api:
        _, stdout, _ = run_to_end(scripted, api, AT_INIT="log_in_threads()")
    assert stdout.count(f"[{NAME}] {'x' * 100}\n") == 1600


def test_only_its_own_packages_are_importable(scripted):
    """Packages of this machine could hide that a pin is missing."""
    with FakeLambda([SHUTDOWN]) as api:
        _, stdout, _ = run_to_end(scripted, api, AT_INIT="log(json.dumps(sys.path))")
    own, *others = json.loads(re.search(r"\[\"/.*", stdout).group())
    assert own == str(scripted.parent)
    assert not [path for path in others if "packages" in path]


@pytest.mark.parametrize("path", ["", "/nowhere"], ids=["empty", "without Python"])
def test_launcher_finds_python_without_the_functions_path(path):
    """Here nothing is in /opt for Python to run."""
    ran = run(ROOT / "extensions" / NAME, env={"PATH": path})
    assert f"can't open file '/opt/{NAME}/main.py'" in ran.stderr


def test_launcher_withholds_the_functions_variables(tmp_path):
    """AWS lists them; the emulator passes them on. Here, `env` is the Python that starts."""
    withheld = [
        "AWS_EXECUTION_ENV",
        "AWS_LAMBDA_LOG_GROUP_NAME",
        "AWS_LAMBDA_LOG_STREAM_NAME",
        "AWS_XRAY_CONTEXT_MISSING",
        "AWS_XRAY_DAEMON_ADDRESS",
        "LAMBDA_RUNTIME_DIR",
        "LAMBDA_TASK_ROOT",
        "_AWS_XRAY_DAEMON_ADDRESS",
        "_AWS_XRAY_DAEMON_PORT",
        "_HANDLER",
    ]
    environment = dict.fromkeys([*withheld, "AWS_LAMBDA_FUNCTION_NAME"], "set")
    environment["PATH"] = path_with(tmp_path, {"python3": "env"})
    ran = run(ROOT / "extensions" / NAME, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert re.findall(r"(?m)^(\w+)=set$", ran.stdout) == ["AWS_LAMBDA_FUNCTION_NAME"]


def test_launcher_ends_the_daemons_runtime_with_the_extension():
    """The Daemon, which sets _INSTANCE, does not, and may have suspended the runtime.

    Here the runtime is a shell's child. The extension ends at once: it is not in /opt.
    """
    shell = 'sleep 60 & kill -STOP $! && "$0"; wait'
    environment = os.environ | {"_INSTANCE": "1"}
    group = {"start_new_session": True, "timeout": 30}
    ended = run("sh", "-c", shell, ROOT / "extensions" / NAME, env=environment, **group)
    assert ended.returncode == -signal.SIGTERM


def test_secrets_example_fetches_again_when_the_secret_is_old(extension, tmp_path):
    """A failure leaves the old secret. Only the owner can read the file."""
    secret = tmp_path / "secret"
    settings = f"\nSECRET_FILE = {str(secret)!r}\nMAX_AGE_SECONDS = 0\n"
    code = (ROOT / "examples" / "secrets" / "extension.py").read_text() + settings
    main = variant(extension, tmp_path, {"extension.py": code})
    read = []

    def event(connection):
        read.append(secret.read_text())
        connection.sendall(invoke_event())

    responses = [answer(body=b"one"), answer(body=b"two"), answer(500), answer(body=b"three")]
    with (
        ScriptedServer({"": responses}) as store,
        FakeLambda([event, event, event, event, SHUTDOWN]) as api,
    ):
        status, stdout, _ = run_to_end(main, api, SECRET_URL=f"http://{store.address}/")
    assert status == 0
    assert read == ["one", "two", "two", "three"]
    assert secret.stat().st_mode & 0o777 == 0o600
    assert stdout.count("Keeping the old secret: HTTPError\n") == 1
