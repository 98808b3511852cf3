"""The server under load: a crowd, clients that go away, and ends at random moments."""

from __future__ import annotations

import http.client
import json
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import Served, data_url, picture_part, serving, text_part

import visprune
from visprune.demo.scenes import scene
from visprune.runtime import Message

CROWD = 100
LEAVING = 30
PATH = "/v1/chat/completions"
LONG = {"model": "tiny", "messages": [{"role": "user", "content": "Tell me."}], "max_tokens": 200}


@pytest.fixture(scope="module")
def server(demo_bundle, tiny_bundle):
    with serving([demo_bundle, tiny_bundle], "--max-queue", "16") as served:
        yield served
        assert served.process.poll() is None
        assert "which is a bug" not in "\n".join(served.lines)


@pytest.fixture(scope="module")
def alone(demo_bundle):
    with visprune.load(demo_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def wanted(tiny_bundle):
    """The answer to `LONG`."""
    with visprune.load(tiny_bundle, threads=1) as pipeline:
        yield pipeline.generate([], "Tell me.", max_new_tokens=200).text


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def until_lines(served, count, seen=0):
    """Every request that was taken has a line, and no other one."""
    until(lambda: sum(f"POST {PATH}" in line for line in served.lines[seen:]) == count)


def ended(served):
    """How many accepted requests have ended, by their ends."""
    lines = served.get("/metrics").body.decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("visprune_requests_total{"):
            finish = line.partition('finish="')[2].partition('"')[0]
            found[finish] = found.get(finish, 0) + float(line.split()[-1])
    return found


def idle(served):
    figures = ("active_requests", "queued_requests", "conversation_memory_bytes")
    return not any(served.metric(f"visprune_{name}") for name in figures)


def schema(number):
    """The schema of an answer that only one client can get; the picture says the rest."""
    return {
        "type": "object",
        "properties": {"client": {"const": number}, "shape": {"enum": ["circle", "star", "heart", "square"]}},
        "required": ["client", "shape"],
        "additionalProperties": False,
    }


class TestCrowd:
    def ask(self, served, number, barrier=None):
        content = [picture_part(data_url(scene(number).image)), text_part("Which shape is there?")]
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema(number)}}
        body = {
            "model": "uniform",
            "messages": [{"role": "user", "content": content}],
            "response_format": form,
        }
        if barrier is not None:
            barrier.wait()
        return served.request("POST", PATH, body)

    def test_every_client_gets_its_answer_or_is_told_when_to_try_again(self, server, alone):
        barrier = threading.Barrier(CROWD)
        refused = 'visprune_refusals_total{code="queue_full"}'
        before, refusals = ended(server).get("eos", 0), server.metric(refused)
        with ThreadPoolExecutor(CROWD) as clients:
            replies = list(clients.map(lambda n: self.ask(server, n, barrier), range(CROWD)))
            for reply in replies:
                assert reply.status in (200, 429)
                if reply.status == 429:
                    assert reply.error["code"] == "queue_full"
                    assert int(reply.headers["Retry-After"]) >= 1
            tried, full = CROWD, sum(reply.status == 429 for reply in replies)
            assert 0 < full <= CROWD - 20
            assert server.metric(refused) - refusals == full
            assert ended(server)["eos"] - before == CROWD - full

            def again(number):
                """Try as often as it takes; return how often that was."""
                times = 0
                while replies[number].status != 200:
                    time.sleep(int(replies[number].headers["Retry-After"]))
                    replies[number] = self.ask(server, number)
                    times += 1
                return times

            tried += sum(clients.map(again, range(CROWD)))
        assert ended(server)["eos"] - before == CROWD
        assert server.metric(refused) - refusals == tried - CROWD
        assert idle(server)
        self.check(replies, alone)

    def check(self, replies, alone):
        for number, reply in enumerate(replies):
            text = reply.json["choices"][0]["message"]["content"]
            parts = [scene(number).image, "Which shape is there?"]
            turn = alone.prepare([Message("user", parts)], schema=schema(number), max_new_tokens=512)
            wanted = alone.answer(turn).result
            assert text == wanted.text
            assert json.loads(text)["client"] == number
            assert reply.json["usage"]["completion_tokens"] == len(wanted.token_ids)


def test_clients_that_go_away_leave_nothing(server):
    rng = random.Random(5)
    body = json.dumps({**LONG, "stream": True}).encode()
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    before, seen = ended(server), len(server.lines)

    def leave(moment, share):
        """Go away while the body is sent, at once afterwards, or after a part of the answer."""
        with server.raw() as connection:
            if moment == "sending":
                connection.sendall(request[: -max(1, int(share * len(body)))])
                return
            connection.sendall(request)
            if moment == "answered":
                left = int(share * 20_000)
                while left > 0 and (piece := connection.recv(min(left, 1000))):
                    left -= len(piece)

    moments = [(rng.choice(["sending", "waiting", "answered"]), rng.random()) for _ in range(LEAVING)]
    with ThreadPoolExecutor(10) as clients:
        list(clients.map(lambda one: leave(*one), moments))
    until(lambda: idle(server))
    until_lines(server, LEAVING, seen)
    counts = {name: count - before.get(name, 0) for name, count in ended(server).items()}
    assert counts["client_gone"] > 0
    assert sum(counts.values()) <= sum(moment != "sending" for moment, _ in moments)
    assert server.chat("Tell me.", model="tiny").status == 200


class TestEnds:
    """A signal at a random moment, while twelve clients ask one question after another."""

    def client(self, served, stream, wanted):
        """Ask until the server is gone; return what the replies were, and at last what ended it."""
        found = []
        while True:
            try:
                reply = served.request("POST", PATH, {**LONG, "stream": stream})
            except (OSError, http.client.HTTPException) as error:
                # Without a byte of a reply the request was not taken; with one, it is half a reply.
                half = isinstance(error, http.client.IncompleteRead)
                return [*found, "half a reply" if half else "no reply"]
            if reply.status != 200:
                found.append(reply.error["code"])
                if found[-1] == "draining":
                    return found
                continue
            if not stream:
                assert reply.json["choices"][0]["message"]["content"] == wanted
            elif reply.events[-1] == "[DONE]":
                pieces = [event["choices"][0]["delta"].get("content", "") for event in reply.events[:-1]]
                assert "".join(pieces) == wanted
            else:
                found.append(f"{reply.events[-1]['error']['code']} after pieces")
                continue
            found.append("whole")

    def end(self, served, number, delay, wanted):
        """Send the signal, and return all that the clients saw."""
        with ThreadPoolExecutor(12) as clients:
            asked = [clients.submit(self.client, served, bool(n % 2), wanted) for n in range(12)]
            time.sleep(delay)
            served.process.send_signal(number)
            return [one for client in asked for one in client.result(60)]

    @pytest.mark.parametrize(
        ("number", "options", "code"),
        [
            (signal.SIGTERM, (), 0),
            (signal.SIGTERM, ("--drain-timeout", "0"), 0),
            (signal.SIGINT, (), 130),
            (signal.SIGKILL, (), -signal.SIGKILL),
        ],
    )
    def test_under_load(self, tiny_bundle, wanted, number, options, code):
        rng, port = random.Random(number), 0
        for _ in range(2):
            served = Served([tiny_bundle], "--max-queue", "4", *options, "--port", str(port))
            try:
                port = served.ready().port  # the next server takes it
                found = self.end(served, number, rng.uniform(0.05, 0.8), wanted)
                assert served.process.wait(60) == code
            finally:
                served.process.kill()
                served.process.wait()
            if number == signal.SIGKILL:
                assert set(found) <= {"whole", "queue_full", "half a reply", "no reply"}
                continue
            told = {"draining", "draining after pieces"} if options else {"draining"}
            assert set(found) <= {"whole", "queue_full", "no reply", *told}
            until_lines(served, sum(one != "no reply" for one in found))
            assert "which is a bug" not in "\n".join(served.lines)
