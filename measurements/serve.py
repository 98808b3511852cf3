"""The server under load, what its caches save, and how evenly conversations take turns, on a CPU.

    python measurements/serve.py load BUNDLE      # 100 clients at once; memory after 200 and 2,000 requests
    python measurements/serve.py cached BUNDLE    # a second question, and a continued conversation
    python measurements/serve.py turns BUNDLE     # gaps between the tokens of four conversations

`load` starts a server with --max-queue 16 and sends requests in waves of 100. Each client asks about an
image of its own, and the answer must be the one that the same question gets alone. A client that is refused
(429) asks again after the seconds that the refusal tells. `cached` starts a server, too. Its times to the
first token are those of the client, from the request to the reply with one token; each pair of questions is
about a new image. `turns` runs the scheduler in this process. A gap is the time between two tokens of one
conversation while all four are past their first token.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import io
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visprune.cores import processor_name
from visprune.runtime import Message, Pipeline, load
from visprune.serve.metrics import Metrics
from visprune.serve.models import ServedModel
from visprune.serve.scheduler import Limits, Scheduler

CLIENTS, WAVES = 100, 20
PAIRS, ACTIVE, TOKENS = 10, 4, 48


class Server:
    """A server process on a free port."""

    def __init__(self, bundle: Path, *options: str) -> None:
        command = [sys.executable, "-m", "visprune", "serve", str(bundle), "--port", "0", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.port = 0
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if found := re.search(r"http://[^/]+:(\d+)/", line):
                self.port = int(found[1])
            if line.startswith("Ready"):
                break
        threading.Thread(target=lambda: list(self.process.stderr or ()), daemon=True).start()
        self.model = json.loads(self.request("GET", "/v1/models")[2])["data"][0]["id"]

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, int, bytes]:
        """Send one request; return the status of its reply, the seconds of Retry-After or 0, and the body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        data = None if body is None else json.dumps(body).encode()
        connection.request(method, path, data, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        found = reply.status, int(reply.headers.get("Retry-After", 0)), reply.read()
        connection.close()
        return found

    def ask(self, messages: list[Any], **fields: Any) -> tuple[int, int, Any]:
        """Ask for a completion; return as `request` does, with the object of the body."""
        body = {"model": self.model, "messages": messages, **fields}
        status, again, reply = self.request("POST", "/v1/chat/completions", body)
        return status, again, json.loads(reply)

    def first_token(self, messages: list[Any]) -> float:
        """Return the milliseconds until the first token of a completion is known to the client."""
        start = time.perf_counter()
        status = self.ask(messages, max_tokens=1)[0]
        assert status == 200
        return (time.perf_counter() - start) * 1e3

    def resident(self) -> int:
        """Return the bytes that the process has in memory."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


@contextmanager
def server(bundle: Path, *options: str) -> Iterator[Server]:
    """Start a server, and end it."""
    made = Server(bundle, *options)
    try:
        yield made
    finally:
        made.process.terminate()
        made.process.wait()


def picture(number: int) -> dict[str, Any]:
    """Return a part of a message with an image of random blocks, another for each number."""
    blocks = np.random.default_rng(number).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((336, 336), Image.Resampling.NEAREST).save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def question(number: int, text: str) -> dict[str, Any]:
    """Return a user's message about an image."""
    return {"role": "user", "content": [picture(number), {"type": "text", "text": text}]}


def measure_load(bundle: Path) -> dict[str, Any]:
    """Send waves of clients, and return how many were answered, how fast, and what memory it took."""
    with server(bundle, "--max-queue", "16", "--prefix-cache", "16MB", "--picture-cache", "16MB") as served:
        messages = [[question(n, f"What is the letter? {n}")] for n in range(CLIENTS)]
        alone = [served.ask(one, max_tokens=4)[2]["choices"][0]["message"] for one in messages]
        statuses: Counter[int] = Counter()
        times: list[float] = []
        memory: dict[int, int] = {}

        def client(number: int) -> None:
            status = 429
            while status == 429:
                start = time.perf_counter()
                status, again, reply = served.ask(messages[number], max_tokens=4)
                statuses[status] += 1
                time.sleep(again if status == 429 else 0)
            times.append((time.perf_counter() - start) * 1e3)  # of the request that was answered
            assert reply["choices"][0]["message"] == alone[number], number

        with ThreadPoolExecutor(CLIENTS) as clients:
            for wave in range(1, WAVES + 1):
                list(clients.map(client, range(CLIENTS)))
                memory[wave * CLIENTS] = served.resident()
        cuts = statistics.quantiles(times, n=100)
        return {
            "clients at once": CLIENTS,
            "answers": CLIENTS * WAVES,
            "replies by status": dict(statuses),
            "answered, ms": {"p50": round(cuts[49], 1), "p99": round(cuts[98], 1)},
            "resident MB": {count: round(memory[count] / 1e6, 1) for count in (200, 2000)},
            "growth": round(memory[2000] / memory[200], 4),
        }


def measure_cached(bundle: Path) -> dict[str, Any]:
    """Return the times to the first token of first and second questions, and of a continued conversation."""
    found: dict[str, Any] = {}
    cases = {
        "both caches": [],
        "pictures only": ["--prefix-cache", "0"],
        "none": ["--prefix-cache", "0", "--picture-cache", "0"],
    }
    for name, options in cases.items():
        with server(bundle, *options) as served:
            for warm_up in range(2):
                served.first_token([question(1000 + warm_up, "What is the letter?")])
            rows: list[tuple[float, float, float]] = []
            for n in range(PAIRS):
                first = [question(n, "What is the letter?")]
                answer = {"role": "assistant", "content": "A"}
                more = [*first, answer, {"role": "user", "content": "And its color?"}]
                rows.append(
                    (
                        served.first_token(first),
                        served.first_token([question(n, "Which color is it?")]),
                        served.first_token(more),
                    )
                )
            found[name] = {
                "first, ms": summary([row[0] for row in rows]),
                "second / first": summary([row[1] / row[0] for row in rows], 3),
                "continued / first": summary([row[2] / row[0] for row in rows], 3),
            }
            figures = served.request("GET", "/metrics")[2].decode().splitlines()
            found[name]["metrics"] = [line for line in figures if "cache" in line and line[0] != "#"]
    return found


def summary(values: list[float], digits: int = 0) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": round(median, digits), "from": round(low, digits), "to": round(high, digits)}


class Recorder(Metrics):
    """The server's figures, with the time of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.firsts: list[float] = []
        self.gaps: list[tuple[float, float]] = []

    def first_token(self, model: str, seconds: float) -> None:
        """Note a first token."""
        super().first_token(model, seconds)
        self.firsts.append(time.monotonic())

    def later_token(self, model: str, seconds: float) -> None:
        """Note the beginning and the length of a gap."""
        super().later_token(model, seconds)
        self.gaps.append((time.monotonic() - seconds, seconds))

    def taken(self) -> list[float]:
        """Return the gaps, in ms, that began after the last first token, and forget all."""
        found = [length * 1e3 for begin, length in self.gaps if begin >= max(self.firsts)]
        self.firsts, self.gaps = [], []
        return found


async def measure_turns(bundle: Path) -> dict[str, Any]:
    """Return the gaps between tokens with one and with several active conversations."""
    recorder = Recorder()
    scheduler = Scheduler(
        [ServedModel("m", bundle)], lambda model: load(model.path), Limits(max_active=ACTIVE), recorder
    )
    scheduler.start()
    await scheduler.loaded()
    pipeline = scheduler.pipeline("m")
    alone: list[float] = []
    together: list[float] = []
    worst: list[float] = []
    for number in range(6):
        await answered(scheduler, pipeline, [number])
        single = recorder.taken()
        await answered(scheduler, pipeline, [10 * number + other for other in range(ACTIVE)])
        several = recorder.taken()
        if number:  # the first round warms up
            alone += single
            together += several
            worst.append(max(several) / (ACTIVE * statistics.median(single)))
    await asyncio.to_thread(scheduler.stop)
    return {
        "one conversation, ms a token": summary(alone, 1),
        f"{ACTIVE} conversations, ms between tokens": {
            **summary(together, 1),
            "largest": round(max(together), 1),
        },
        f"largest gap of a round / ({ACTIVE} x median alone)": [round(one, 3) for one in worst],
    }


async def answered(scheduler: Scheduler, pipeline: Pipeline, numbers: list[int]) -> None:
    """Let conversations about images run at once, to their ends."""
    turns = []
    for number in numbers:
        blocks = np.random.default_rng(number).integers(0, 255, (336, 336, 3), dtype=np.uint8)
        turns.append(
            pipeline.prepare([Message("user", [blocks, "What is the letter?"])], max_new_tokens=TOKENS)
        )

    async def run(turn: Any) -> None:
        async with scheduler.submit("m", turn) as job:
            async for _ in job.events():
                pass

    await asyncio.gather(*map(run, turns))


def main() -> None:
    """Run one measurement, and print its figures as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["load", "cached", "turns"])
    parser.add_argument("bundle", type=Path)
    args = parser.parse_args()
    if args.what == "turns":
        found = asyncio.run(measure_turns(args.bundle))
    else:
        found = {"load": measure_load, "cached": measure_cached}[args.what](args.bundle)
    machine = f"{processor_name()}, {len(os.sched_getaffinity(0))} cores"
    print(json.dumps({"machine": machine, "bundle": str(args.bundle), **found}, indent=2))


if __name__ == "__main__":
    main()
