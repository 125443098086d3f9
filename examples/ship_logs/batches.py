"""Collects records and sends them to COLLECTOR_URL, in JSON arrays and beside the function.

Each is sent once or more often.
"""

import collections
import json
import os
import threading
import time

from lifecycle import log

# A batch is due with so many records, or after so much time; after a failure only then.
RECORDS, SECONDS = 100, 10
# Records in an array, and bytes of unsent ones, at most.
ARRAY, BYTES = 500, 1_000_000
# Seconds that process() waits for a batch, and leaves before Lambda ends the invocation.
DEADLINE, MARGIN = 1, 0.5
# Seconds without a byte from the collector; attempts at a time, as one may be stuck.
TIMEOUT, ATTEMPTS = 5, 3


class Batches:
    """Records on their way to a collector.

    Each is kept until an answer of 2xx, or of 4xx, which refuses it.
    """

    def __init__(self):
        self._lock = threading.Lock()
        # (number, JSON text), the oldest first; their size.
        self._unsent, self._bytes = collections.deque(), 0
        # Records: ever, at the last attempt, since the last log line.
        self._added = self._tried = self._dropped = 0
        # Threads; wall clock, because the monotonic one stops in a freeze.
        self._attempts, self._last = [], time.time()

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
            # The newest are kept, but not one that leaves no room for others.
            while self._bytes > BYTES:
                _, text = self._unsent.pop() if len(text) > BYTES else self._unsent.popleft()
                self._bytes -= len(text)
                self._dropped += 1

    def send(self, event):
        """Sends what is due, at SHUTDOWN all that is unsent, and waits for that until DEADLINE.

        Ends process(event).
        """
        final = event["eventType"] == "SHUTDOWN"
        self._attempt(final)
        for attempt in self._attempts[-1:]:
            end = self._last + DEADLINE
            if not final:
                end = min(end, event["deadlineMs"] / 1000 - MARGIN)
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
            # No attempt has had any of these, so none of them has failed.
            is_full = len(self._unsent) >= RECORDS and self._unsent[0][0] >= self._tried
            self._attempts = [attempt for attempt in self._attempts if attempt.is_alive()]
            is_due = final or ((is_late or is_full) and len(self._attempts) < ATTEMPTS)
            if self._unsent and is_due:
                self._tried, self._last = self._added, time.time()
                # A thread can be left alone: DNS, dead addresses and answers that drip take longer
                # than any timeout.
                attempt = threading.Thread(target=self._post, args=[list(self._unsent)])
                self._attempts.append(attempt)
                attempt.start()

    def _post(self, unsent):
        refused = sent = True
        while unsent and (sent or refused):
            array, unsent = unsent[:ARRAY], unsent[ARRAY:]
            try:
                import requests  # slow, so the cold start does not wait for it

                # For each array: a connection that was kept is dead after a freeze.
                with requests.Session() as session:
                    # Otherwise requests reads the answer, followed or not.
                    session.get_redirect_target = lambda resp: None
                    session.headers["Content-Type"] = "application/json"
                    body = f"[{','.join(text for _, text in array)}]".encode()
                    with session.post(self._url, body, timeout=TIMEOUT, stream=True) as answer:
                        status = answer.status_code
                        reason, sent = f"status {status}", 200 <= status < 300
                        refused = 400 <= status < 500 and status not in (408, 429)
            except Exception as error:  # whatever it is, the extension goes on
                sent = refused = False
                reason = type(error).__name__  # its text has the URL, perhaps with a token
            with self._lock:
                while (sent or refused) and self._unsent and self._unsent[0][0] <= array[-1][0]:
                    self._bytes -= len(self._unsent.popleft()[1])
                dropped, self._dropped = self._dropped, 0
            if dropped or not sent:
                outcome = "sent" if sent else "refused" if refused else "not sent yet"
                records = len(array + unsent)
                log(f"{records} records {outcome}: {reason}; {dropped} older ones dropped")
