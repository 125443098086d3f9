# SPDX-License-Identifier: MIT-0
"""Collects records and, while the function runs, sends them to COLLECTOR_URL, many per request.

Each record arrives at least once, unless the collector refuses it, or fails until newer records
have filled the buffer, or until the extension ends.
"""

import collections
import itertools
import json
import os
import sys
import threading
import time

from lifecycle import fail_with, log

# At the end of an invocation, a batch is sent if BATCH_RECORDS are waiting, or if the previous
# batch began BATCH_SECONDS ago. In a long invocation, one is sent after BATCH_SECONDS, too.
BATCH_RECORDS = 100
BATCH_SECONDS = 10

# The most that may wait, in bytes of memory. A batch is also sent when half of it is taken. When
# all of it is taken, the oldest records are dropped.
MAX_WAITING_BYTES = 1_000_000

# The most that one request contains.
RECORDS_IN_REQUEST = 1_000
CHARACTERS_IN_REQUEST = 500_000

# How long the callers of send() and wait_for_room() wait for the collector, and how long before the
# invocation's deadline send() returns.
PATIENCE_SECONDS = 1
MARGIN_SECONDS = 0.5

# How long send() takes at most after SHUTDOWN, and how long before the deadline it returns.
SHUTDOWN_SECONDS = 1.2
SHUTDOWN_MARGIN_SECONDS = 0.1

# A request fails when no byte of the response arrives within this time. That timeout stands still
# while Lambda freezes the environment, and does not cover DNS. So a sender that has had no answer
# for a second more than this time, by the wall clock, is replaced by another one.
TIMEOUT_SECONDS = 5

# How many replaced senders may still hang. Each of them keeps a thread, and a request.
MAX_HANGING_SENDERS = 8

# What becomes of a request.
SENT = "sent"
REFUSED = "refused"
FAILED = "failed"

# With these statuses, a collector objects to what a request contains. After any other status that
# is not 2xx, the same request may succeed later.
REFUSING_STATUSES = (400, 413, 422)

encode = json.JSONEncoder(allow_nan=False).encode  # NaN is not JSON


class Batches:
    """Records on their way to a collector. A thread of its own, the sender, sends them.

    All waiting records together become a batch. There is one batch at a time, and it belongs to one
    sender. A sender whose batch is no longer the current one has been replaced, and gives up.
    """

    def __init__(self) -> None:
        self.url = ""
        self.token = ""
        self._changed = threading.Condition()  # also the lock of all that follows
        self._waiting = collections.deque()  # JSON texts, the oldest first
        self._waiting_bytes = 0
        self._timer_ends = 0.0  # when a batch is due, by the monotonic clock
        self._batch = collections.deque()  # the texts being sent, older than those waiting
        self._batch_began = time.time()
        self._last_answer = time.time()  # to this batch; before the first one, when it began
        self._last_success = time.time()  # likewise
        self._has_failed = False  # whether the previous batch has
        self._sender = None  # a thread
        self._replaced_senders = []  # threads that may still hang
        # Counted since the log last reported them:
        self._dropped = 0
        self._refused = 0
        self._refusal = ""  # the reason for the last refusal

    def start(self) -> None:
        """Reads COLLECTOR_URL and COLLECTOR_TOKEN, and starts the sender. Call this in init().

        It ends the extension if there is no valid URL.
        """
        self.url = os.environ.get("COLLECTOR_URL", "").strip()
        self.token = os.environ.get("COLLECTOR_TOKEN", "").strip()
        if not self.url.startswith(("http://", "https://")):
            raise SystemExit("COLLECTOR_URL must be an http:// or https:// URL")
        self._start_sender()

    def request(self, texts: list[str]) -> tuple[bytes, dict[str, str]]:
        """Returns the body and the headers of a request that sends these records (JSON texts).

        Override this for another format. An exception here is a bug, and ends the extension.
        """
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        return f"[{','.join(texts)}]".encode(), headers

    def add(self, record: object) -> None:
        """Adds a record, which must be something that JSON can hold. Any thread may call this.

        Raises TypeError, ValueError or RecursionError if JSON cannot hold it.
        """
        self.add_texts([encode(record)])

    def add_texts(self, texts: list[str]) -> None:
        """Adds records that are JSON already. Any thread may call this."""
        with self._changed:
            if not self._waiting:
                self._start_timer()
            # A record that is larger than the buffer would push all others out of it.
            kept = [text for text in texts if sys.getsizeof(text) <= MAX_WAITING_BYTES]
            self._dropped += len(texts) - len(kept)
            self._waiting.extend(kept)
            self._waiting_bytes += sum(map(sys.getsizeof, kept))
            self._replace_stuck_sender()
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
        seconds_left = event["deadlineMs"] / 1000 - time.time()
        with self._changed:
            if event["eventType"] == "SHUTDOWN":
                self._send_everything(min(seconds_left - SHUTDOWN_MARGIN_SECONDS, SHUTDOWN_SECONDS))
                return
            self._replace_stuck_sender()
            is_time = seconds_since(self._batch_began) >= BATCH_SECONDS
            is_enough = len(self._waiting) >= BATCH_RECORDS and not self._has_failed
            if is_time or is_enough:
                self._begin_batch()
            patience = PATIENCE_SECONDS - seconds_since(self._batch_began)
            self._wait_for_batch(min(patience, seconds_left - MARGIN_SECONDS))

    def _send_everything(self, seconds):
        end = time.monotonic() + seconds
        # An earlier batch may hang. Then another sender takes it over, with all other records.
        while self._batch and time.monotonic() < end:
            patience = PATIENCE_SECONDS - seconds_since(self._last_answer)
            if patience <= 0:
                self._replace_sender()
                break
            self._wait_for_batch(min(patience, end - time.monotonic()))
        self._has_failed = False
        while (self._batch or self._waiting) and not self._has_failed and time.monotonic() < end:
            self._begin_batch()
            self._wait_for_batch(end - time.monotonic())
        if self._batch or self._waiting:
            unconfirmed = len(self._batch) + len(self._waiting)
            log(f"Records not confirmed before the end: {unconfirmed}")
        self._log_losses()

    def _wait_for_batch(self, seconds):
        """Waits until this batch is sent, has failed or is taken away, or until the time is up."""
        batch = self._batch
        self._changed.wait_for(lambda: not batch or batch is not self._batch, max(0, seconds))

    def _is_half_full(self):
        return self._waiting_bytes > MAX_WAITING_BYTES / 2

    def _start_timer(self):
        """Lets the sender begin a batch after BATCH_SECONDS, if nobody else has begun one.

        The monotonic clock stands still while Lambda freezes the environment. That is intended: the
        next invocation is to send these records at its end, together with its own.
        """
        self._timer_ends = time.monotonic() + BATCH_SECONDS
        self._changed.notify_all()

    def _begin_batch(self):
        """Hands all waiting records to the sender, unless it is still at work."""
        if self._waiting and not self._batch:
            self._batch = self._waiting
            self._waiting = collections.deque()
            self._waiting_bytes = 0
            self._batch_began = self._last_answer = self._last_success = time.time()
            self._changed.notify_all()

    def _end_batch(self, has_failed):
        """Puts the unsent records back among the waiting ones."""
        self._waiting.extendleft(reversed(self._batch))
        self._waiting_bytes += sum(map(sys.getsizeof, self._batch))
        self._batch = collections.deque()
        self._has_failed = has_failed
        self._drop_oldest()
        self._log_losses()
        self._start_timer()

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

    def _start_sender(self):
        self._sender = threading.Thread(target=self._run_sender)
        self._sender.start()

    def _replace_stuck_sender(self):
        if self._batch and seconds_since(self._last_answer) > TIMEOUT_SECONDS + 1:
            self._replace_sender()

    def _replace_sender(self):
        """Lets another thread be the sender, if one can be started, and ends the batch."""
        hanging = [thread for thread in self._replaced_senders if thread.is_alive()]
        if len(hanging) >= MAX_HANGING_SENDERS:
            return
        replaced = self._sender
        try:
            self._start_sender()
        except RuntimeError:  # no thread can be started
            self._sender = replaced
            return
        self._replaced_senders = [*hanging, replaced]
        log(f"Records not sent yet: {len(self._batch)} (no answer)")
        self._end_batch(has_failed=True)

    def _run_sender(self):
        try:
            self._send_batches()
        except BaseException as error:  # a bug in request() is treated like one in process()
            fail_with(error)

    def _send_batches(self):
        """Sends batch after batch, until this sender is replaced."""
        import requests  # imported only here, so that the extension registers sooner

        session = requests.Session()
        # Otherwise the requests library reads the body of a redirect, of any size, even though it
        # does not follow the redirect.
        session.get_redirect_target = lambda resp: None
        me = threading.current_thread()
        while True:
            with self._changed:
                while not self._batch and me is self._sender:
                    seconds = self._timer_ends - time.monotonic() if self._waiting else None
                    if seconds is None or seconds > 0:
                        self._changed.wait(seconds)
                    else:
                        self._begin_batch()
                if me is not self._sender:
                    return
                batch = self._batch
            self._send_batch(session, batch)

    def _send_batch(self, session, batch):
        """Sends the batch in few requests, and in smaller ones where the collector refuses some."""
        size = RECORDS_IN_REQUEST
        while True:
            texts = beginning_of(batch, size)
            outcome, reason = self._post(session, texts)
            with self._changed:
                if batch is not self._batch:
                    return  # this sender has been replaced
                self._last_answer = time.time()
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
                    self._last_success = self._last_answer
                for _ in texts:
                    batch.popleft()
                size = min(2 * size, RECORDS_IN_REQUEST)
                if not batch:
                    self._end_batch(has_failed=False)
                    return

    def _post(self, session, texts):
        """Sends records; returns SENT, REFUSED or FAILED, and the reason (str)."""
        body, headers = self.request(texts)
        try:
            # Each request gets a connection of its own, because one that was kept is dead after a
            # freeze. The body of the response is not read, because it may be of any size.
            with session.post(
                self.url,
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
