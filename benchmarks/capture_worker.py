"""A process of its own for `capture_zoo.py`, which measures one network after another within limits."""

from __future__ import annotations

import faulthandler
import gc
import json
import logging
import os
import queue
import resource
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict

import torch
from capture_measures import Row
from capture_study import PEERS, Study
from record import seconds
from zoo_cases import Entry


def work(options: Row) -> None:
    """Read entries from stdin, write rows to stdout; all that a model prints goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.DEBUG if options["debug"] else logging.CRITICAL, force=True)
    logging.getLogger("torch").setLevel(logging.WARNING)
    faulthandler.enable()
    torch.set_num_threads(options["threads"])
    torch.backends.mha.set_fastpath_enabled(False)
    if options["memory"]:
        bytes_ = int(options["memory"] * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (bytes_, bytes_))
    for line in sys.stdin:
        start = time.perf_counter()
        study = Study(Entry(**json.loads(line)), options, lambda row: print(json.dumps({"row": row}), file=out))
        row = study.measure()
        row["total s"] = seconds(time.perf_counter() - start)
        row["max RSS MiB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        print(json.dumps({"row": row, "done": True}), file=out)
        del study
        gc.collect()


class Worker:
    """A process that measures one model after another; a new one is started after a crash and after ``lives`` models."""

    def __init__(self, options: Row, lives: int) -> None:
        self.options, self.lives = options, lives
        self.process: subprocess.Popen[str] | None = None

    def measure(self, entry: Entry) -> Row:
        """The row of ``entry``, or what of it came before the worker died or was stopped."""
        if self.process is None:
            self._start()
        process, lines = self.process, self.lines
        row: Row = asdict(entry)
        deadline = time.monotonic() + self.options["limit"] + 60
        deadline += len(PEERS) * 2 * self.options["peer_limit"] if self.options["peers"] else 0
        try:
            process.stdin.write(json.dumps(asdict(entry)) + "\n")
            process.stdin.flush()
            while True:
                line = lines.get(timeout=max(deadline - time.monotonic(), 0.01))
                if line is None:
                    raise EOFError
                message = json.loads(line)
                row = message["row"]
                if message.get("done"):
                    break
        except queue.Empty:
            row = self._broken(row, "stopped: it did not answer to the time limit")
        except (EOFError, OSError):
            row = self._broken(row, f"the process died (exit {process.wait(10)})")
        else:
            self.left -= 1
            if self.left <= 0:
                self.stop()
        return row

    def _broken(self, row: Row, what: str) -> Row:
        self.stop()
        stage = row.pop("stage", "start")
        if stage in PEERS:
            row[stage] = {"verdict": what}
        elif "verdict" in row:
            row["note"] = f"{row.get('note', '')} {what} in {stage}".strip()
        else:
            row["verdict"] = f"failed: {what} in {stage}"
        return row

    def _start(self) -> None:
        errors = None if self.options["debug"] else subprocess.DEVNULL
        command = [sys.executable, __file__, json.dumps(self.options)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.left = self.lives
        threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
