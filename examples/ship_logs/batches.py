"""Collects records and sends them to COLLECTOR_URL, in JSON arrays and beside the function: each once or more often."""

import collections
import json
import os
import threading
import time

from lifecycle import log

RECORDS, SECONDS = 100, 10  # a batch is due with so many records, or after so much time; after a failure only then
ARRAY, BYTES = 500, 1_000_000  # records in an array, and bytes of unsent ones, at most
DEADLINE, MARGIN = 1, 0.5  # seconds that process() waits for a batch, and leaves before Lambda ends the invocation
TIMEOUT, ATTEMPTS = 5, 3  # seconds without a byte from the collector; attempts at a time, as one may be stuck


class Batches:
    """Records on their way to a collector: each is kept until an answer of 2xx, or of 4xx, which refuses it."""

    def __init__(self):
        self._lock = threading.Lock()
        self._unsent, self._bytes = collections.deque(), 0  # (number, JSON text), the oldest first; their size
        self._added = self._tried = self._dropped = 0  # records: ever, at the last attempt, since the last log line
        self._attempts, self._last = [], time.time()  # threads, wall clock: the monotonic one stops in a freeze

    def start(self):
        """Reads COLLECTOR_URL, and ends the start if it is missing. Call this in init()."""
        self._url = os.environ.get("COLLECTOR_URL", "")
        if not self._url.startswith(("http://", "https://")):
            raise SystemExit("COLLECTOR_URL must be an http:// or https:// URL")
        threading.Thread(target=self._watch).start()

    def add(self, record):
        """Adds a record: anything that JSON can hold. Any thread may call this."""
        text = json.dumps(record)
        with self._lock:
            self._unsent.append((self._added, text))
            self._added += 1
            self._bytes += len(text)
            while self._bytes > BYTES:  # the newest are kept, but not one that leaves no room for others
                _, text = self._unsent.pop() if len(text) > BYTES else self._unsent.popleft()
                self._bytes -= len(text)
                self._dropped += 1

    def send(self, event):
        """Sends what is due, at SHUTDOWN all that is unsent, and waits for that until DEADLINE. Ends process(event)."""
        final = event["eventType"] == "SHUTDOWN"
        self._attempt(final)
        for attempt in self._attempts[-1:]:
            end = self._last + DEADLINE if final else min(self._last + DEADLINE, event["deadlineMs"] / 1000 - MARGIN)
            attempt.join(end - time.time())
            if final and attempt.is_alive():
                log(f"{len(self._unsent)} records not sent: no answer within {DEADLINE} s")

    def _watch(self):
        while True:  # in long invocations, and on Managed Instances, which have no INVOKE event
            time.sleep(0.2)
            self._attempt()

    def _attempt(self, final=False):
        with self._lock:
            is_late = not 0 <= time.time() - self._last < SECONDS  # or the clock was set back
            is_full = len(self._unsent) >= RECORDS and self._unsent[0][0] >= self._tried  # so none of these has failed
            self._attempts = [attempt for attempt in self._attempts if attempt.is_alive()]
            if self._unsent and (final or ((is_late or is_full) and len(self._attempts) < ATTEMPTS)):
                self._tried, self._last = self._added, time.time()
                # A thread can be left alone: DNS, dead addresses and answers that drip take longer than any timeout.
                self._attempts.append(threading.Thread(target=self._post, args=[list(self._unsent)]))
                self._attempts[-1].start()

    def _post(self, unsent):
        refused = sent = True
        while unsent and (sent or refused):
            array, unsent = unsent[:ARRAY], unsent[ARRAY:]
            try:
                import requests  # slow, so the cold start does not wait for it

                with requests.Session() as session:  # for each array: a connection that was kept is dead after a freeze
                    session.get_redirect_target = lambda answer: None  # else requests reads the answer, followed or not
                    session.headers["Content-Type"] = "application/json"
                    body = f"[{','.join(text for _, text in array)}]".encode()
                    with session.post(self._url, body, timeout=TIMEOUT, stream=True) as answer:
                        reason, sent = f"status {answer.status_code}", 200 <= answer.status_code < 300
                        refused = 400 <= answer.status_code < 500 and answer.status_code not in (408, 429)
            except Exception as error:  # whatever it is, the extension goes on
                reason, sent, refused = type(error).__name__, False, False  # its text has the URL, perhaps with a token
            with self._lock:
                while (sent or refused) and self._unsent and self._unsent[0][0] <= array[-1][0]:
                    self._bytes -= len(self._unsent.popleft()[1])
                dropped, self._dropped = self._dropped, 0
            if dropped or not sent:
                outcome = "sent" if sent else "refused" if refused else "not sent yet"
                log(f"{len(array + unsent)} records {outcome}: {reason}; {dropped} older ones dropped")
