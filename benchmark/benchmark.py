"""Measures what an extension costs: this one, simpler and faster ones, and none, each under the real emulator."""

import argparse
import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAME = next(ROOT.glob("*/extension.py")).parent.name
HERE = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tests"))
from extensions_api_server import SHUTDOWN, ExtensionsApiServer, invoke  # noqa: E402

CONTENDERS = {
    "no extension": None,
    "unpooled": HERE / "unpooled.py",
    "pooled": HERE / "pooled.py",
    "this extension": ROOT / NAME / "extension.py",
    "http.client": HERE / "http_client.py",
}
# Figure: unit, digits, and for the ratio to "unpooled" whether what the function costs by itself is taken off.
FIGURES = {
    "init": ("ms", 0, False),
    "first invoke": ("ms", 0, False),
    "warm invoke": ("ms", 2, True),
    "warm invoke p99": ("ms", 2, True),
    "CPU per event": ("µs", 0, False),
    "RSS": ("MiB", 1, False),
    "TCP connections per 1,000 events": ("", 0, False),
}


def progress(text):
    """Shows the progress on a line that the next one replaces."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text:
        print(text, file=sys.stderr, flush=True)


def run(*command, **options):
    """Runs a command and returns its output as text."""
    return subprocess.run(
        [str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True, **options
    ).stdout


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def installed():
    """The folder with the dependencies and the emulator that the run script installs."""
    process = subprocess.Popen(
        [ROOT / f"{NAME}.sh", "--no-docker", "-p", str(free_port())],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if "starting;" in line:
            break
    process.terminate()
    process.wait()
    return max((ROOT / ".run").glob(f"{NAME}-*"), key=os.path.getmtime)


def stage(folder, source):
    """Makes the folder that shows as /opt, with that extension in it."""
    dependencies = installed_folder / "opt" / NAME
    (folder / "opt" / "extensions").mkdir(parents=True)
    (folder / "task").mkdir()
    run("cp", "-al", dependencies, folder / "opt" / NAME)
    run("cp", "-al", f"{next(installed_folder.glob('python/lib/python*/site-packages'))}/.", folder / "task")
    shutil.copy(ROOT / "lambda_function.py", folder / "task")
    shutil.copy(ROOT / "lambda-entrypoint.sh", folder)
    launcher = folder / "opt" / "extensions" / NAME
    if source == CONTENDERS["this extension"]:
        shutil.copy(ROOT / "extensions" / NAME, launcher)
        for module in source.parent.glob("*.py"):
            shutil.copy(module, folder / "opt" / NAME)
    elif source:
        launcher.write_text(f"#!/bin/bash\nexec /opt/{NAME}/extension.py\n")
        launcher.chmod(0o755)
        shutil.copy(source, folder / "opt" / NAME / "extension.py")
    # As in the image, and so that no contender pays for another one's first start.
    run(sys.executable, "-m", "compileall", "-q", folder / "opt" / NAME, folder / "task")


@contextlib.contextmanager
def emulator(folder):
    """Runs the emulator on a staged folder; yields its port, the port of its Extensions API, and its log file."""
    port, api_port = free_port(), free_port()
    with tempfile.NamedTemporaryFile() as log:
        mount = 'mount -t overlay -o lowerdir="$0/opt":/opt overlay /opt && cd "$0/task" && exec "$@"'
        isolated = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", mount, folder]
        addresses = ["--runtime-interface-emulator-address", f"127.0.0.1:{port}"]
        addresses += ["--runtime-api-address", f"127.0.0.1:{api_port}"]
        runtime = [folder / "lambda-entrypoint.sh", "lambda_function.lambda_handler"]
        process = subprocess.Popen(
            [*isolated, installed_folder / "aws-lambda-rie", *addresses, *runtime],
            env={"PATH": f"{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin", "LAMBDA_TASK_ROOT": str(folder / "task")},
            stdout=log,
            stderr=log,
        )
        try:
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.01)
            yield port, api_port, Path(log.name)
        finally:
            process.kill()
            process.wait()


def extension_process(api_port):
    """The extension that uses that API, as its folder in /proc."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            at_api = f"AWS_LAMBDA_RUNTIME_API=127.0.0.1:{api_port}" in (process / "environ").read_text().split("\0")
            if at_api and "extension.py" in (process / "cmdline").read_text():
                return process
    return None


def cpu_seconds(process):
    """What the process has used of the CPU so far."""
    return sum(int(task.read_text().split()[0]) for task in process.glob("task/*/schedstat")) / 1e9


def client(port):
    """A function that invokes the function with a payload (bytes) and returns the seconds it took."""
    connection = http.client.HTTPConnection("127.0.0.1", port)

    def call(payload=b'{"key": "value"}'):
        start = time.perf_counter()
        connection.request("POST", "/2015-03-31/functions/function/invocations", payload)
        answer = connection.getresponse().read()
        seconds = time.perf_counter() - start
        assert b"Hello from Lambda!" in answer, answer
        return seconds

    return call


def measure(folder, invocations):
    """Runs a contender once in its own environment; returns its figures by name."""
    with emulator(folder) as (port, api_port, log):
        call = client(port)
        figures = {"first invoke": call() * 1e3}
        for _ in range(50):
            call()
        process = extension_process(api_port)
        before = cpu_seconds(process) if process else 0
        times = sorted(call() for _ in range(invocations))
        time.sleep(0.05)
        figures["warm invoke"] = statistics.median(times) * 1e3
        figures["warm invoke p99"] = times[int(len(times) * 0.99)] * 1e3
        if process:
            figures["CPU per event"] = (cpu_seconds(process) - before) / invocations * 1e6
            figures["RSS"] = int(re.search(r"VmRSS:\s+(\d+)", (process / "status").read_text()).group(1)) / 1024
        figures["init"] = float(re.search(r"INIT REPORT\(durationMs: ([\d.]+)\)", log.read_text()).group(1))
    return figures


def connections(folder):
    """The TCP connections that an extension opens for a thousand events."""
    with ExtensionsApiServer([*[invoke("event")] * 1000, SHUTDOWN]) as api:
        environment = {"PATH": os.environ["PATH"], "AWS_LAMBDA_RUNTIME_API": api.address}
        run(sys.executable, folder / "opt" / NAME / "extension.py", env=environment)
        return api.connections


def benchmark(rounds, invocations):
    """The figures of every contender: {contender: {figure: (median, lowest, highest)}}."""
    with tempfile.TemporaryDirectory() as folder:
        folders = {contender: Path(folder) / str(number) for number, contender in enumerate(CONTENDERS)}
        for contender, source in CONTENDERS.items():
            stage(folders[contender], source)
        runs = {contender: [] for contender in CONTENDERS}
        for number in range(rounds):
            for contender in CONTENDERS:
                progress(f"round {number + 1} of {rounds}: {contender}")
                runs[contender].append(measure(folders[contender], invocations))
        results = {}
        for contender, figures in runs.items():
            columns = {figure: [each[figure] for each in figures] for figure in figures[0]}
            if CONTENDERS[contender]:
                columns["TCP connections per 1,000 events"] = [connections(folders[contender])]
            results[contender] = {
                figure: (statistics.median(values), min(values), max(values)) for figure, values in columns.items()
            }
    progress("")
    return results


def ratio(results, figure, contender):
    """A contender's figure relative to the unpooled one's, or None."""
    values = {name: figures.get(figure, (None,))[0] for name, figures in results.items()}
    if values[contender] is None or contender == "no extension":
        return None
    base = values["no extension"] if FIGURES[figure][2] else 0
    return (values[contender] - base) / (values["unpooled"] - base)


def growth(events):
    """Measures whether this extension slows down with events or payloads, in turn with an environment without one.

    Returns what it adds to a warm invoke, in ms, around event 1,000 and at the end, and the CPU time per event, in µs,
    by payload. The extension never sees the payload, but it costs more CPU time after a pause, and invocations with a
    large one are rarer: so small payloads are sent as rarely, too.
    """
    contenders = "this extension", "no extension"
    with contextlib.ExitStack() as stack:
        calls = []
        for contender in contenders:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            stage(folder, CONTENDERS[contender])
            port, api_port, _ = stack.enter_context(emulator(folder))
            calls.append(client(port))
            calls[-1]()
            if contender == "this extension":
                process = extension_process(api_port)
        added = []
        for number in range(events):
            if number % 1000 == 0:
                progress(f"event {number:,} of {events:,}")
            added.append(calls[0]() - calls[1]())
        cpu, pause = {}, 0
        for size in 1_000, 100_000, 5_000_000, 1_000:
            name = f"{size:,} bytes" + (", as rarely as those" if pause else "")
            progress(f"payloads of {name}")
            payload, count = json.dumps({"data": "x" * size}).encode(), 100
            before, start = cpu_seconds(process), time.monotonic()
            for _ in range(count):
                time.sleep(pause)
                calls[0](payload)
            if size == 5_000_000:
                pause = (time.monotonic() - start) / count
            time.sleep(0.05)
            cpu[name] = (cpu_seconds(process) - before) / count * 1e6
    progress("")
    return {
        "added to a warm invoke at event 1,000, ms": statistics.median(added[500:1500]) * 1e3,
        f"added to a warm invoke at event {events:,}, ms": statistics.median(added[-1000:]) * 1e3,
        **{f"CPU per event with a payload of {name}, µs": value for name, value in cpu.items()},
    }


def image(base_image):
    """The image's figures on that base: MB added to it, and seconds to build from nothing and after an edit."""
    tag = f"{NAME}-benchmark"

    def build(sample, *options):
        start = time.perf_counter()
        options = ["--build-arg", f"BASE_IMAGE={base_image}", "--tag", tag, *options]
        run("docker", "build", "--quiet", *options, sample, stderr=subprocess.DEVNULL)
        return time.perf_counter() - start

    def size(name):
        return int(run("docker", "image", "inspect", "--format", "{{.Size}}", name)) / 1e6

    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        sample = shutil.copytree(ROOT, Path(folder) / NAME, ignore=shutil.ignore_patterns(".run", ".venv", ".git"))
        progress("building the image from nothing")
        figures["build from nothing, s"] = build(sample, "--no-cache")
        figures["size added to the base, MB"] = size(tag) - size(base_image)
        for edited in "lambda_function.py", f"{NAME}/extension.py":
            times = []
            for number in range(5):
                progress(f"building the image after an edit of {edited}")
                with (sample / edited).open("a") as file:
                    file.write(f"# edit {number}\n")
                times.append(build(sample))
            figures[f"build after an edit of {edited}, s"] = statistics.median(times)
    run("docker", "image", "rm", tag)
    progress("")
    return figures


def table(results):
    """The results as a table in Markdown; in parentheses the ratio to the unpooled extension."""
    lines = ["| | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    for figure, (unit, digits, added) in FIGURES.items():
        cells = []
        for contender, figures in results.items():
            if figure not in figures:
                cells.append("–")
                continue
            median, low, high = figures[figure]
            cell = f"{median:,.{digits}f}"
            if high > low:
                cell += f" [{low:,.{digits}f}–{high:,.{digits}f}]"
            if contender not in ("no extension", "unpooled"):
                cell += f" (×{ratio(results, figure, contender):.2f})"
            cells.append(cell)
        name = f"{figure}, {unit}" if unit else figure
        lines.append(f"| {name}{' ¹' if added else ''} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chart(results, path):
    """Draws the figures, relative to the unpooled extension, into an image file."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": NAME, "svg.fonttype": "none"}
    figures = ["init", "warm invoke", "CPU per event", "RSS"]
    contenders = [contender for contender in results if contender != "no extension"]
    _, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(contenders)
    colors = {"unpooled": "#bbbbbb", "pooled": "#88aacc", "this extension": "#dd7722", "http.client": "#99bb99"}
    for number, contender in enumerate(contenders):
        values = [ratio(results, figure, contender) for figure in figures]
        positions = [place + number * width for place in range(len(figures))]
        bars = axes.bar(positions, values, width * 0.94, label=contender, color=colors[contender])
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
    names = [f"{figure},\nadded by the extension" if FIGURES[figure][2] else figure for figure in figures]
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(figures))], names)
    axes.set_ylabel("unpooled = 1")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=len(contenders), loc="upper center", bbox_to_anchor=(0.5, 1.12))
    plt.savefig(path, metadata={"Date": None} if str(path).endswith(".svg") else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="runs of each contender, taken in turn (default: 9)")
    parser.add_argument("--invocations", type=int, default=1000, help="warm invocations in a run (default: 1000)")
    parser.add_argument("--growth", type=int, metavar="EVENTS", help="also run this extension for this many events")
    parser.add_argument("--image", metavar="BASE_IMAGE", help="also build the image on that base and measure it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument("--chart", type=Path, metavar="FILE", help="also draw the results, as .svg or .png")
    options = parser.parse_args()
    if os.geteuid() != 0 or sys.platform != "linux":
        parser.error("this needs Linux and root, for mount namespaces without a user namespace around them")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    global installed_folder
    installed_folder = installed()
    results = benchmark(options.rounds, options.invocations)
    print(f"Median of {options.rounds} runs of {options.invocations} invocations each [lowest–highest] (× unpooled)\n")
    print(table(results))
    print("\n¹ ratio of the time added to an invocation")
    everything = {"extensions": results}
    if options.growth:
        everything["growth"] = growth(options.growth)
        print()
        for name, value in everything["growth"].items():
            print(f"{name}: {value:,.2f}" if name.endswith("ms") else f"{name}: {value:,.0f}")
    if options.image:
        everything["image"] = image(options.image)
        print()
        for name, value in everything["image"].items():
            print(f"{name}: {value:.1f}")
    if options.json:
        options.json.write_text(json.dumps(everything, indent=2) + "\n")
    if options.chart:
        chart(results, options.chart)


if __name__ == "__main__":
    main()
