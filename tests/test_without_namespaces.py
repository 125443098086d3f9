"""Running without Docker where namespaces are refused, as in a plain container: by links into /opt."""

import re

import pytest
from helpers import NAME, RECEIVED, TEST_IMAGE, build, copy_sample, first_base_image, run


@pytest.fixture(scope="module")
def plain_container(folder, engine):
    """Runs a bash script in a container, which refuses namespaces, with Python, pip and a copy of the sample."""
    sample = copy_sample(folder / "plain")
    image = build(sample, f"{TEST_IMAGE}:plain", first_base_image(), "--target", "dependencies")

    def start(commands, *options):
        begin = "cp -r /mounted /tmp/sample && cd /tmp/sample\n"
        mount = ["--volume", f"{sample}:/mounted:ro"]
        command = ["docker", "run", "--rm", "--interactive", *mount, *options, image, "bash", "-s"]
        return run(*command, input=begin + commands)

    return start


def test_where_namespaces_are_refused_it_links_into_opt_for_the_duration_of_the_run(plain_container):
    ran = plain_container(f"""
        ln -s /tmp/sample/.run/run.killed/opt/{NAME} /opt # as a killed run leaves it
        ./{NAME}.sh >log 2>&1 & script=$!
        until grep 'ready;' log || ! kill -0 $script; do sleep 0.1; done
        python3 -c '
import urllib.request
print(urllib.request.urlopen("http://localhost:8080/2015-03-31/functions/function/invocations", b"{{}}").read())'
        echo during: $(ls /opt)
        kill -TERM $script; wait $script; echo status: $?
        echo after: $(ls /opt) $(ls .run | grep run)
        sed s/^/log:/ log
        cat /proc/[0-9]*/cmdline | tr '\\0' ' ' >/tmp/left
        echo left: $(grep -o -e awslambdaric -e extension.py -e aws-lambda-rie /tmp/left)
    """)
    assert f"log:{NAME}: no namespaces here: linking into /opt for the duration of the run\n" in ran.stdout
    assert "Hello from Lambda!" in ran.stdout
    assert f"during: extensions {NAME}\n" in ran.stdout
    assert re.search("^status: 0$", ran.stdout, re.MULTILINE)
    assert re.search("^after:$", ran.stdout, re.MULTILINE)
    assert re.search("^left:$", ran.stdout, re.MULTILINE), ran.stdout
    assert re.search(rf"^log:\[\S+\] {RECEIVED}", ran.stdout, re.MULTILINE)


def test_where_namespaces_are_refused_it_does_not_replace_what_is_in_opt(plain_container):
    ran = plain_container(f"mkdir /opt/extensions; ./{NAME}.sh; echo status: $?; ls /opt; ls .run | grep run")
    advice = "end the run that uses it, or remove it, or use --docker"
    assert ran.stderr.splitlines()[-1] == f"{NAME}: /opt/extensions exists already; {advice}"
    assert ran.stdout == "status: 1\nextensions\n"


def test_where_namespaces_and_opt_are_refused_it_fails_with_one_line(plain_container):
    ran = plain_container(f"./{NAME}.sh; echo status: $?", "--user", "12345")
    reason = "no user namespaces, and no permission to write to /opt"
    assert ran.stderr.splitlines()[-1] == f"{NAME}: {reason}; use --docker, or root"
    assert ran.stdout == "status: 1\n"
