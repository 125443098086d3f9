# SPDX-License-Identifier: MIT-0
"""Collects records and, while the function runs, posts them to COLLECTOR_URL, many per request.

Each record arrives at least once, unless the collector refuses it, or fails until newer records
have filled the buffer, or until the extension exits.
"""

import collections
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable

import requests
from lifecycle import fail_with, log

# A batch is sent at the end of an invocation if BATCH_RECORDS are waiting, or if the previous batch
# began BATCH_SECONDS ago. During a long invocation, one is sent after BATCH_SECONDS, too.
BATCH_RECORDS = 100
BATCH_SECONDS = 10

# The most that can wait, in bytes of memory. A batch is also sent when half of it is taken. When
# all of it is taken, the oldest records are dropped.
MAX_WAITING_BYTES = 1_000_000

# The most that one request contains.
RECORDS_IN_REQUEST = 1_000
CHARACTERS_IN_REQUEST = 500_000

# How long send() and wait_for_room() wait for the collector, at SHUTDOWN and at any other time, and
# how long before an event's deadline send() returns.
SHUTDOWN_SECONDS = 1.2
PATIENCE_SECONDS = 1
MARGIN_SECONDS = 0.2

# A request fails when no byte of the response arrives within this time. That timeout stands still
# while Lambda freezes the environment, and does not cover DNS. So a batch that has had no response
# for a second more than this time, by the wall clock, is given up.
TIMEOUT_SECONDS = 5

# How many threads of batches that were given up can still hang. Each of them keeps a request.
MAX_HANGING_THREADS = 8

# What becomes of a request.
SENT = "sent"
REFUSED = "refused"
FAILED = "failed"

# With these statuses, a collector objects to what a request contains. After any other status that
# is not 2xx, the same request may succeed later.
REFUSING_STATUSES = (400, 413, 422)

encode = json.JSONEncoder(allow_nan=False).encode  # NaN is not JSON


def json_array(texts: list[str], token: str) -> tuple[bytes, dict[str, str]]:
    """Returns the body and the headers of a request that sends these records (JSON texts)."""
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token}"
    return f"[{','.join(texts)}]".encode(), headers


class Batches:
    """Records on their way to a collector, in the format that make_request gives them.

    make_request is a function like json_array(). An exception in it is a bug, and ends the
    extension.

    All waiting records together become a batch, which a thread of its own sends. There is one batch
    at a time. If its thread hangs, the batch is given up: its records wait again, and the thread
    ends as soon as it notices.
    """

    def __init__(self, make_request: Callable = json_array) -> None:
        self._make_request = make_request
        self._url = ""
        self._token = ""
        self._session = requests.Session()
        self._changed = threading.Condition()  # also the lock of all that follows
        self._waiting = collections.deque()  # JSON texts, the oldest first
        self._waiting_bytes = 0
        self._timer_runs = False
        self._batch = collections.deque()  # the texts being sent, older than those waiting
        self._batch_began = time.time()
        self._last_response = time.time()  # to this batch; before the first one, when it began
        self._last_success = time.time()  # likewise
        self._has_failed = False  # whether the previous batch has
        self._hanging_threads = 0  # of batches that were given up
        # Counted since the log last reported them:
        self._dropped = 0
        self._refused = 0
        self._refusal = ""  # the reason for the last refusal

    def start(self) -> None:
        """Reads COLLECTOR_URL and COLLECTOR_TOKEN. Call this in init(), before add().

        It ends the extension if the URL, or the file of REQUESTS_CA_BUNDLE, is not valid.
        """
        self._url = os.environ.get("COLLECTOR_URL", "").strip()
        self._token = os.environ.get("COLLECTOR_TOKEN", "").strip()
        if not self._url.startswith(("http://", "https://")):
            raise SystemExit("COLLECTOR_URL must be an http:// or https:// URL")
        # requests would let ~/.netrc replace the token. Only what it takes from the environment
        # besides is wanted: proxies, and a company's certificates.
        self._session.trust_env = False
        self._session.proxies = requests.utils.get_environ_proxies(self._url)
        certificates = os.environ.get("REQUESTS_CA_BUNDLE")
        if certificates:
            if not os.path.exists(certificates):
                raise SystemExit(f"REQUESTS_CA_BUNDLE names no file: {certificates}")
            self._session.verify = certificates
        # requests would read the body of a redirect, of any size, even without following it.
        self._session.get_redirect_target = lambda resp: None

    def add(self, record: object) -> None:
        """Adds a record, which must be something that JSON can hold. Any thread can call this.

        Raises TypeError, ValueError or RecursionError if JSON cannot hold it.
        """
        self.add_texts([encode(record)])

    def add_texts(self, texts: list[str]) -> None:
        """Adds records that are JSON already. Any thread can call this."""
        with self._changed:
            # A record that is larger than the buffer would push all others out of it.
            kept = [text for text in texts if sys.getsizeof(text) <= MAX_WAITING_BYTES]
            self._dropped += len(texts) - len(kept)
            self._waiting.extend(kept)
            self._waiting_bytes += sum(map(sys.getsizeof, kept))
            self._start_timer()
            self._give_up_hanging_batch(TIMEOUT_SECONDS + 1)
            if self._is_half_full() and not self._has_failed:
                self._begin_batch()
            self._drop_oldest()

    def wait_for_room(self) -> None:
        """Waits while more than half of the buffer is taken, and the collector accepts records."""
        with self._changed:
            while self._batch and self._is_half_full():
                patience = PATIENCE_SECONDS - seconds_since(self._last_success)
                if patience <= 0:
                    break
                self._changed.wait(patience)

    def send(self, event: dict) -> None:
        """Sends what is due, and waits a moment for it. Call this at the end of process(event).

        At SHUTDOWN it sends everything, and says how many records it could not send.
        """
        seconds_left = event["deadlineMs"] / 1000 - time.time() - MARGIN_SECONDS
        with self._changed:
            if event["eventType"] == "SHUTDOWN":
                self._send_everything(min(seconds_left, SHUTDOWN_SECONDS))
                return
            self._give_up_hanging_batch(TIMEOUT_SECONDS + 1)
            is_time = seconds_since(self._batch_began) >= BATCH_SECONDS
            is_enough = len(self._waiting) >= BATCH_RECORDS and not self._has_failed
            if is_time or is_enough:
                self._begin_batch()
            patience = PATIENCE_SECONDS - seconds_since(self._batch_began)
            self._wait_for_batch(min(patience, seconds_left))

    def _send_everything(self, seconds):
        end = time.monotonic() + seconds
        self._give_up_hanging_batch(PATIENCE_SECONDS)
        self._has_failed = False
        while (self._batch or self._waiting) and not self._has_failed and time.monotonic() < end:
            self._begin_batch()
            self._wait_for_batch(end - time.monotonic())
        if self._batch or self._waiting:
            unconfirmed = len(self._batch) + len(self._waiting)
            log(f"Records not confirmed before the end: {unconfirmed}")
        self._log_losses()

    def _wait_for_batch(self, seconds):
        """Waits until this batch is sent, has failed or is given up, or until the time is up."""
        batch = self._batch
        self._changed.wait_for(lambda: not batch or batch is not self._batch, max(0, seconds))

    def _is_half_full(self):
        return self._waiting_bytes > MAX_WAITING_BYTES / 2

    def _start_timer(self):
        """Sends what is waiting after BATCH_SECONDS, if it is still waiting then.

        The timer stands still while Lambda freezes the environment. That is intended: the next
        invocation is to send these records at its end, together with its own.
        """
        if self._waiting and not self._timer_runs:
            self._timer_runs = True
            threading.Timer(BATCH_SECONDS, self._end_timer).start()

    def _end_timer(self):
        with self._changed:
            self._timer_runs = False
            self._begin_batch()

    def _begin_batch(self):
        """Starts to send all waiting records, unless a batch is being sent already."""
        if self._waiting and not self._batch:
            self._batch = self._waiting
            self._waiting = collections.deque()
            self._waiting_bytes = 0
            self._batch_began = self._last_response = self._last_success = time.time()
            threading.Thread(target=self._run_thread, args=[self._batch]).start()

    def _end_batch(self, has_failed):
        """Puts the unsent records back among the waiting ones."""
        self._waiting.extendleft(reversed(self._batch))
        self._waiting_bytes += sum(map(sys.getsizeof, self._batch))
        self._batch = collections.deque()
        self._has_failed = has_failed
        self._drop_oldest()
        self._log_losses()
        self._start_timer()
        self._changed.notify_all()

    def _give_up_hanging_batch(self, seconds):
        """Ends the batch if it has had no response for so long, unless too many threads hang."""
        is_hanging = self._batch and seconds_since(self._last_response) > seconds
        if is_hanging and self._hanging_threads < MAX_HANGING_THREADS:
            self._hanging_threads += 1
            log(f"Records not sent yet: {len(self._batch)} (no response)")
            self._end_batch(has_failed=True)

    def _drop_oldest(self):
        while self._waiting_bytes > MAX_WAITING_BYTES:
            self._waiting_bytes -= sys.getsizeof(self._waiting.popleft())
            self._dropped += 1

    def _log_losses(self):
        if self._refused:
            log(f"Records refused: {self._refused} ({self._refusal})")
        if self._dropped:
            log(f"Records dropped: {self._dropped} (too many, or too large)")
        self._refused = 0
        self._dropped = 0

    def _run_thread(self, batch):
        try:
            self._send_batch(batch)
        except BaseException as error:  # a bug in make_request() is treated like one in process()
            fail_with(error)

    def _send_batch(self, batch):
        """Sends the batch in few requests, and in smaller ones where the collector refuses some."""
        size = RECORDS_IN_REQUEST
        while batch:
            texts = beginning_of(batch, size)
            outcome, reason = self._post(texts)
            with self._changed:
                if batch is not self._batch:
                    self._hanging_threads -= 1
                    return
                self._last_response = time.time()
                if outcome == FAILED:
                    log(f"Records not sent yet: {len(batch)} ({reason})")
                    self._end_batch(has_failed=True)
                    return
                if outcome == REFUSED and len(texts) > 1:
                    size = len(texts) // 2  # some of these are to blame: find out which
                    continue
                if outcome == REFUSED:
                    self._refused += 1
                    self._refusal = reason
                else:
                    self._last_success = self._last_response
                for _ in texts:
                    batch.popleft()
                size = min(2 * size, RECORDS_IN_REQUEST)
                if not batch:
                    self._end_batch(has_failed=False)

    def _post(self, texts):
        """Sends records; returns SENT, REFUSED or FAILED, and the reason (str)."""
        body, headers = self._make_request(texts, self._token)
        try:
            # Each request gets a connection of its own, because one that was kept is dead after a
            # freeze. The body of the response is not read, because it may be of any size.
            with self._session.post(
                self._url,
                data=body,
                headers=headers,
                timeout=TIMEOUT_SECONDS,
                allow_redirects=False,
                stream=True,
            ) as response:
                status = response.status_code
        except Exception as error:  # HTTP clients raise more than they document
            return FAILED, type(error).__name__  # its text has the URL, perhaps with a token
        if 200 <= status < 300:
            return SENT, f"status {status}"
        if status in REFUSING_STATUSES:
            return REFUSED, f"status {status}"
        return FAILED, f"status {status}"


def beginning_of(batch, size):
    """Returns the first texts of a batch: as many as size says, or as fit into a request."""
    texts = []
    space = CHARACTERS_IN_REQUEST
    for text in itertools.islice(batch, size):
        space -= len(text)
        if space < 0 and texts:
            break
        texts.append(text)
    return texts


def seconds_since(moment):
    """Returns the time since a moment of the wall clock, or infinity if it has been set back.

    time.monotonic() would stand still while Lambda freezes the environment.
    """
    seconds = time.time() - moment
    return seconds if seconds >= 0 else float("inf")
