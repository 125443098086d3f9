# SPDX-License-Identifier: MIT-0
"""SIGTERM and SIGINT, which ask the extension to end, and the watchdog that ends it in time.

Lambda announces the end with a SHUTDOWN event. The signals come from whoever else stops a program:
a container engine, an emulator, Ctrl-C. Importing this module installs handlers for them.
Until then, a signal kills the extension as it kills any program, so this module comes before slow
imports.
"""

import _thread  # the threading module takes longer to import
import os
import select
import signal
import time

SIGNALS = (signal.SIGTERM, signal.SIGINT)

# How long the extension may take to end after a signal. Lambda allows 2 seconds after a SHUTDOWN
# event, and keeps up to half a second of them for the function's runtime:
# https://docs.aws.amazon.com/lambda/latest/dg/runtimes-extensions-api.html
SHUTDOWN_SECONDS = 1.5

# How long the extension may take to show and report a failure.
FAILURE_SECONDS = 5

# The watchdog reads its orders from a pipe. Each is a byte: the number of a signal, or FAILURE,
# which is no signal's number.
FAILURE = 0

TIME_LIMITS = {
    signal.SIGTERM: SHUTDOWN_SECONDS,
    signal.SIGINT: SHUTDOWN_SECONDS,
    FAILURE: FAILURE_SECONDS,
}

# Whether this process is a fork of the extension, which your code or a library has made.
is_fork = False


def set_signal_handler(handler):
    """Sets the handler of SIGTERM and SIGINT: a function (signum, frame), or SIG_DFL."""
    for signum in SIGNALS:
        signal.signal(signum, handler)


def limit_time(order):
    """Gives the watchdog an order (int): the number of a signal that has come, or FAILURE."""
    try:
        os.write(_pipe_writer, bytes([order]))
    except OSError:
        pass  # your code has closed the pipe, or it is full


def _end_at_once(signum, frame):
    """Handles a signal that comes before run(), when nothing has begun that must be shut down."""
    os._exit(0)


def _watch():
    """Ends the process when its time is up, whatever the main thread is doing then."""
    exit_status = 0
    deadline = None
    while True:
        seconds_left = None if deadline is None else max(0, deadline - time.monotonic())
        orders, _, _ = select.select([_pipe_reader], [], [], seconds_left)
        if not orders:
            os._exit(exit_status)
        order = os.read(_pipe_reader, 1)[0]
        if order == FAILURE:
            exit_status = 1
        if order not in TIME_LIMITS:  # a signal that a library handles
            continue
        limit = time.monotonic() + TIME_LIMITS[order]
        if deadline is None and order in SIGNALS:
            # The main thread may just have begun to wait for Lambda, too late for the signal to
            # interrupt it, or the kernel may have given the signal to another thread. Then only
            # the same signal, sent to the main thread itself, gets the handler called.
            time.sleep(0.05)
            signal.pthread_kill(_main_thread, order)
        deadline = limit if deadline is None else min(deadline, limit)


# A fork inherits the handlers and the wakeup fd (see below), so a signal to it would reach the
# pipe, and end the extension. To prevent that, signals are blocked during a fork, until the child
# has reset both.
_masks_before_fork = {}  # the signals that are blocked, by thread


def _before_fork():
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    _masks_before_fork[_thread.get_ident()] = mask


def _after_fork():
    mask = _masks_before_fork.pop(_thread.get_ident())
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _after_fork_in_child():
    global is_fork
    is_fork = True
    signal.set_wakeup_fd(-1)
    set_signal_handler(signal.SIG_DFL)
    _after_fork()


# Python calls a handler only between two steps of Python code, so a call into C, such as one for
# DNS, delays it. But Python writes the signal's number at once to a pipe, its "wakeup fd", where
# the watchdog, a second thread, reads it. The watchdog starts now, because a process that has
# failed may be unable to start a thread.
_main_thread = _thread.get_ident()
_pipe_reader, _pipe_writer = os.pipe()
os.set_blocking(_pipe_writer, False)  # as Python demands of a wakeup fd
signal.set_wakeup_fd(_pipe_writer)
_thread.start_new_thread(_watch, ())
set_signal_handler(_end_at_once)
os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork,
    after_in_child=_after_fork_in_child,
)
