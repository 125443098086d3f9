#!/usr/bin/env python3
"""Measures what an extension costs those who wait for a function, and those who pay for it.

Prints the table of docs/cost.md. Everything is measured in turn, round by round, in environment.py:
no extension, other extensions, this one, and the least that Python can do (http_client.py). It
needs Linux with two CPUs and, for mounts, root.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from environment import ROOT, Environment

NAME = next(ROOT.glob("*/extension.py")).parent.name
NONE = "no extension"
SLOW_START_MS = 250

# The rows of the table. The first four come with their lowest and highest value.
INIT_TWO_CPUS = "init with two CPUs, ms"
INIT_ONE_CPU = "init with one CPU, ms"
INIT_BOTO3 = (
    f"init with two CPUs, with boto3 and a function that takes {SLOW_START_MS} ms to start, ms"
)
FIRST = "billed duration of the first invocation, ms"
ADDED = "added to the billed duration of a warm invocation, ms"
CPU = "CPU time per event, µs"
RSS = "memory (RSS), MiB"
CONNECTIONS = "TCP connections for {:,} events"
WITH_RANGE = (INIT_TWO_CPUS, INIT_ONE_CPU, INIT_BOTO3, FIRST)


def measure_round(opts, task, invocations):
    """Measures everything once; returns {name: {row: value}}."""
    figures = {name: {} for name in opts}
    for name, opt in opts.items():
        with Environment(opt, task, cpus=2, start_ms=0) as environment:
            figures[name][INIT_TWO_CPUS] = environment.init()
            figures[name][FIRST] = environment.invoke()
        with Environment(opt, task, cpus=1, start_ms=0) as environment:
            figures[name][INIT_ONE_CPU] = environment.init()
        with_boto3 = opt.with_name(f"{opt.name}-boto3")
        if with_boto3.exists():
            with Environment(with_boto3, task, cpus=2, start_ms=SLOW_START_MS) as environment:
                figures[name][INIT_BOTO3] = environment.init()
        with Environment(opt, task, cpus=2, start_ms=0) as environment:
            figures[name] |= measure_warm(environment, invocations)
    without = figures[NONE].pop(ADDED)
    for name in opts:
        if name != NONE:
            figures[name][ADDED] -= without
    return figures


def measure_warm(environment, invocations):
    """Invokes a function often; returns {row: value}, the whole billed duration as ADDED."""
    environment.init()
    for _ in range(50):
        environment.invoke()
    process = environment.processes.get("the extension")
    cpu_before = process and cpu_microseconds(process.pid)
    figures = {ADDED: statistics.median(environment.invoke() for _ in range(invocations))}
    if process:
        figures[CPU] = (cpu_microseconds(process.pid) - cpu_before) / invocations
        figures[RSS] = resident_mebibytes(process.pid)
    return figures


def cpu_microseconds(pid):
    """Returns the CPU time that the threads of a process have taken."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e3


def resident_mebibytes(pid):
    """Returns how much memory a process has."""
    (kibibytes,) = re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(kibibytes) / 1024


def pip_install(target, *what):
    """Installs packages into a folder."""
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--upgrade", "--target", target]
    subprocess.run([*pip, *what], check=True)


def install(folder, others):
    """Installs what environments run: returns {name: folder for /opt} and the task folder."""
    task, packages = folder / "task", folder / "packages"
    pip_install(task, "--require-hashes", "--requirement", ROOT / "requirements.txt")
    pip_install(packages, "--require-hashes", "--requirement", ROOT / NAME / "requirements.txt")
    shutil.copy(ROOT / "benchmark" / "function.py", task / "lambda_function.py")

    opts = {NONE: folder / "none"}
    (opts[NONE] / "extensions").mkdir(parents=True)
    (opts[NONE].with_name("none-boto3") / "extensions").mkdir(parents=True)
    for number, other in enumerate(others):
        (extension,) = other.glob("extensions/*")
        opts[f"AWS's {extension.name}"] = shutil.copytree(other, folder / str(number))
    for name in "this extension", "http.client alone":
        opts[name] = folder / name
        shutil.copytree(packages, folder / name / NAME)
        shutil.copytree(ROOT / "extensions", folder / name / "extensions")
    for file in (ROOT / NAME).glob("*.py"):
        shutil.copy(file, opts["this extension"] / NAME)
    # The launcher starts main.py.
    http_client = ROOT / "benchmark" / "http_client.py"
    shutil.copy(http_client, opts["http.client alone"] / NAME / "main.py")
    for opt in opts.values():
        add_variant_with_boto3(opt)
    # The image has bytecode, too.
    subprocess.run([sys.executable, "-m", "compileall", "-q", folder], check=True)
    return opts, task


def add_variant_with_boto3(opt):
    """Copies an extension in Python, and lets its code import boto3 as well."""
    for code in [*opt.glob("*/extension.py"), *opt.glob("*/main.py")][:1]:
        variant = Path(shutil.copytree(opt, opt.with_name(f"{opt.name}-boto3")))
        pip_install(variant / code.parent.name, "boto3")
        with_import = variant / code.relative_to(opt)
        first_line, rest = code.read_text().split("\n", 1)  # a comment, or #!
        with_import.write_text(f"{first_line}\nimport boto3\n{rest}")


def table(rounds, connections, events):
    """Returns what the rounds have measured as a table in Markdown."""
    names = list(connections)
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row in INIT_TWO_CPUS, INIT_ONE_CPU, INIT_BOTO3, FIRST, ADDED, CPU, RSS:
        cells = [row]
        for name in names:
            values = [figures[name][row] for figures in rounds if row in figures[name]]
            cells.append(shown(values, row in WITH_RANGE) if values else "–")
        lines.append(f"| {' | '.join(cells)} |")
    counts = [f"{count:,}" if count else "–" for count in connections.values()]
    lines.append(f"| {' | '.join([CONNECTIONS.format(events), *counts])} |")
    return "\n".join(lines)


def shown(values, with_range):
    """Returns the median of values as text, and perhaps the lowest and highest in brackets."""
    median = max(0, statistics.median(values))  # a difference can be less than the noise
    digits = 0 if median >= 10 else 2
    text = f"{median:,.{digits}f}"
    if with_range:
        text += f" ({min(values):,.{digits}f}–{max(values):,.{digits}f})"
    return text


def opt_folder(text):
    """Checks an argument that must be a folder for /opt; returns its path."""
    folder = Path(text)
    extensions = list(folder.glob("extensions/*"))
    if len(extensions) != 1:
        raise argparse.ArgumentTypeError(f"{text}/extensions must hold one file, an extension")
    if not os.access(extensions[0], os.X_OK):
        raise argparse.ArgumentTypeError(f"{extensions[0]} is not executable; try chmod +x")
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "others",
        nargs="*",
        type=opt_folder,
        metavar="FOLDER",
        help="other extensions, such as AWS's samples: for each a folder as /opt is to have it",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--invocations", type=int, default=1000, help="in each round")
    parser.add_argument("--events", type=int, default=1000, help="to count TCP connections")
    options = parser.parse_args()
    if sys.platform != "linux" or os.geteuid() != 0 or len(os.sched_getaffinity(0)) < 2:
        parser.error("it needs Linux with two CPUs, and root")
    if "BENCHMARK_HAS_A_NAMESPACE" not in os.environ:
        os.environ["BENCHMARK_HAS_A_NAMESPACE"] = "yes"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])

    with tempfile.TemporaryDirectory() as folder:
        opts, task = install(Path(folder), options.others)
        rounds = []
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            rounds.append(measure_round(opts, task, options.invocations))
        connections = dict.fromkeys(opts, 0)
        for name, opt in opts.items():
            if name != NONE:
                with Environment(opt, task, cpus=2, start_ms=0) as environment:
                    connections[name] = environment.count_connections(options.events)
    print(table(rounds, connections, options.events))


if __name__ == "__main__":
    main()
