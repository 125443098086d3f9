# SPDX-License-Identifier: MIT-0
"""Collects records, and posts them to COLLECTOR_URL, many per request.

Each record arrives at least once, unless the collector refuses it, or is down until the buffer
overflows or the extension exits.
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

# The buffer for waiting records, in bytes of memory. A batch is also sent when it is half
# full. When it is full, the oldest records are dropped.
MAX_WAITING_BYTES = 1_000_000

# The most that one request contains.
RECORDS_IN_REQUEST = 1_000
CHARACTERS_IN_REQUEST = 500_000

# How long send() and wait_for_room() wait for the collector.
PATIENCE_SECONDS = 1

# How long send() takes at SHUTDOWN: less than the 2 seconds that Lambda allows.
SHUTDOWN_SECONDS = 1.2

# How long before an event's deadline send() returns.
MARGIN_SECONDS = 0.2

# A request fails when no byte of the response arrives within this time. That timeout pauses while
# Lambda freezes the environment, and does not cover DNS. So a batch that has had no response for
# HANGING_SECONDS, by the wall clock, is given up.
TIMEOUT_SECONDS = 5
HANGING_SECONDS = TIMEOUT_SECONDS + 1

# How many threads of batches that were given up can still hang. Each holds a request in memory.
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
        self._last_response = time.time()  # or, until there was one, when the batch began
        self._last_success = time.time()  # likewise
        self._has_failed = False  # whether the previous batch failed
        self._hanging_threads = 0  # of batches that were given up
        # Counted since the log last reported them:
        self._dropped = 0
        self._refused = 0
        self._refusal = ""  # the reason for the last refusal

    def start(self) -> None:
        """Reads COLLECTOR_URL and COLLECTOR_TOKEN. Call this in init(), before add().

        It ends the extension if there is no such URL, or no such file as REQUESTS_CA_BUNDLE names.
        """
        self._url = os.environ.get("COLLECTOR_URL", "").strip()
        self._token = os.environ.get("COLLECTOR_TOKEN", "").strip()
        if not self._url.startswith(("http://", "https://")):
            raise SystemExit("COLLECTOR_URL must be an http:// or https:// URL")
        # requests would let ~/.netrc override the token. What else it reads from the environment
        # is set here: proxies, and a company's certificates.
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
        """Adds a record, which must be JSON-serializable. Any thread can call this.

        Raises TypeError, ValueError or RecursionError if JSON cannot hold it.
        """
        self.add_texts([encode(record)])

    def add_texts(self, texts: list[str]) -> None:
        """Adds records that are already encoded as JSON. Any thread can call this."""
        with self._changed:
            # A record that is larger than the buffer would push all others out of it.
            kept = [text for text in texts if sys.getsizeof(text) <= MAX_WAITING_BYTES]
            self._dropped += len(texts) - len(kept)
            self._waiting.extend(kept)
            self._waiting_bytes += sum(map(sys.getsizeof, kept))
            self._start_timer()
            # On Managed Instances, nothing calls send() before SHUTDOWN.
            self._give_up_hanging_batch(HANGING_SECONDS)
            if self._is_half_full() and not self._has_failed:
                self._begin_batch()
            self._drop_oldest()

    def wait_for_room(self) -> None:
        """Waits while the buffer is over half full, as long as the collector makes progress."""
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
            self._give_up_hanging_batch(HANGING_SECONDS)
            is_time = seconds_since(self._batch_began) >= BATCH_SECONDS
            is_enough = len(self._waiting) >= BATCH_RECORDS and not self._has_failed
            if is_time or is_enough:
                self._begin_batch()
            patience = PATIENCE_SECONDS - seconds_since(self._batch_began)
            self._wait_for_batch(min(patience, seconds_left))

    def _send_everything(self, seconds):
        end = time.monotonic() + seconds
        self._give_up_hanging_batch(PATIENCE_SECONDS)
        self._has_failed = False  # there is no later attempt to leave anything to
        while (self._batch or self._waiting) and not self._has_failed and time.monotonic() < end:
            self._begin_batch()
            self._wait_for_batch(end - time.monotonic())
        if self._batch or self._waiting:
            unconfirmed = len(self._batch) + len(self._waiting)
            log(f"Records not confirmed before the end: {unconfirmed}")
        self._log_losses()

    def _wait_for_batch(self, seconds):
        """Waits until the batch, if there is one, is sent, has failed or is given up."""
        batch = self._batch
        self._changed.wait_for(lambda: not batch or batch is not self._batch, max(0, seconds))

    def _is_half_full(self):
        return self._waiting_bytes > MAX_WAITING_BYTES / 2

    def _start_timer(self):
        """Makes sure that what is waiting is sent within BATCH_SECONDS.

        The timer pauses while Lambda freezes the environment. That is intended: the next
        invocation is to send these records at its end, together with its own.
        """
        if self._waiting and not self._timer_runs:
            self._timer_runs = True
            threading.Timer(BATCH_SECONDS, self._on_timer).start()

    def _on_timer(self):
        with self._changed:
            self._timer_runs = False
            self._give_up_hanging_batch(HANGING_SECONDS)
            self._begin_batch()
            self._start_timer()  # if a batch is still being sent

    def _begin_batch(self):
        """Starts to send all waiting records, unless a batch is being sent already."""
        if self._waiting and not self._batch:
            self._batch = self._waiting
            self._waiting = collections.deque()
            self._waiting_bytes = 0
            self._batch_began = self._last_response = self._last_success = time.time()
            threading.Thread(target=self._run_thread, args=[self._batch]).start()

    def _end_batch(self, has_failed):
        """Puts the unsent records back in front of the waiting ones."""
        self._waiting.extendleft(reversed(self._batch))
        self._waiting_bytes += sum(map(sys.getsizeof, self._batch))
        self._batch = collections.deque()
        self._has_failed = has_failed
        self._drop_oldest()
        self._log_losses()
        self._start_timer()
        self._changed.notify_all()

    def _give_up_hanging_batch(self, seconds):
        """Ends the batch if there was no response for that long, unless too many threads hang."""
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
            log(f"Records dropped: {self._dropped} (buffer full, or record too large)")
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
                if batch is not self._batch:  # it was given up
                    self._hanging_threads -= 1
                    return
                self._last_response = time.time()
                if outcome == FAILED:
                    log(f"Records not sent yet: {len(batch)} ({reason})")
                    self._end_batch(has_failed=True)
                    return
                if outcome == REFUSED and len(texts) > 1:
                    size = len(texts) // 2  # some of these are to blame: narrow it down
                    continue
                if outcome == REFUSED:
                    self._refused += 1
                    self._refusal = reason
                else:
                    self._last_success = self._last_response
                    size = min(2 * size, RECORDS_IN_REQUEST)
                for _ in texts:
                    batch.popleft()
                if not batch:
                    self._end_batch(has_failed=False)

    def _post(self, texts):
        """Sends records; returns SENT, REFUSED or FAILED, and the reason (str)."""
        body, headers = self._make_request(texts, self._token)
        try:
            # Closing the response unread closes the connection, too: one that was kept would be
            # dead after a freeze, and the body can be of any size.
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
            return FAILED, type(error).__name__  # its message contains the URL
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
    """Returns the time since a moment of the wall clock, or infinity if that was set back far.

    time.monotonic() would pause while Lambda freezes the environment.
    """
    seconds = time.time() - moment
    return seconds if seconds > -1 else float("inf")
