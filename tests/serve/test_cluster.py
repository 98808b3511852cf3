"""A server with two replicas in a Ray cluster on this machine, one of which is killed under load."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from serving import Reply, Served, data_url, picture_part, serving, text_part

import visprune
from visprune import cli
from visprune.runtime import Message

pytest.importorskip("ray.serve")

# The tiny model is random: its answers are as long as they may be.
TOKENS = 150
QUESTIONS = [f"Question {number}" for number in range(4)]


@pytest.fixture(scope="module")
def cluster(tiny_bundle):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        with serving([tiny_bundle], "--replicas", "2", "--threads", "1") as served:
            yield served


@pytest.fixture(scope="module")
def square():
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, (56, 56, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def expected(tiny_bundle, square):
    """What one process answers to each question."""
    with visprune.load(tiny_bundle) as pipeline:
        turns = [pipeline.prepare([Message("user", [square, q])], max_new_tokens=TOKENS) for q in QUESTIONS]
        return [pipeline.answer(turn).result for turn in turns]


def replicas(served: Served) -> set[int]:
    """Return the process ids of a server's replicas."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            name = path.read_bytes().decode(errors="replace")
        except OSError:  # it has ended meanwhile
            continue
        if name.startswith("ray::ServeReplica:visprune-") and f"-{served.process.pid}:" in name:
            found.add(int(path.parent.name))
    return found


def text_of(reply: Reply) -> str:
    """Return the answer in a reply, whole or streamed to its end."""
    if not reply.headers["Content-Type"].startswith("text/event-stream"):
        return reply.json["choices"][0]["message"]["content"]
    *events, end = reply.events
    assert end == "[DONE]"
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events)


def test_answers_equal_those_of_one_process(cluster, square, expected):
    def ask(number):
        content = [picture_part(data_url(square)), text_part(QUESTIONS[number % 4])]
        return cluster.chat(content, max_tokens=TOKENS, stream=number >= 4)

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(ask, range(8)))
    for reply, answer in zip(replies, expected * 2, strict=True):
        assert text_of(reply) == answer.text
    for reply, answer in zip(replies, expected, strict=False):
        assert reply.json["visprune"]["keep_indices"] == [list(kept) for kept in answer.keep_indices]
        assert reply.json["usage"]["completion_tokens"] == len(answer.token_ids)
    assert len(replicas(cluster)) == 2


def test_refusals_of_replicas_and_what_the_server_answers_itself(cluster):
    refused = cluster.chat("a", frequency_penalty=0.5)
    assert (refused.status, refused.error["param"]) == (400, "frequency_penalty")
    assert cluster.chat("a", model="none").error["code"] == "model_not_found"
    assert cluster.get("/health/ready").json == {"state": "ready"}
    assert b"<html" in cluster.get("/").body
    logged = cluster.line("POST /v1/chat/completions 200")
    assert " out " in logged
    assert " client_gone" not in "\n".join(cluster.lines)


def test_a_replica_that_is_killed_under_load(cluster, square, expected):
    """Every request ends: answered as by one process, or refused so that its client sends it again."""
    before = replicas(cluster)
    ends: Counter[str] = Counter()
    stop = threading.Event()

    def load(number):
        content = [picture_part(data_url(square)), text_part(QUESTIONS[number % 4])]
        while not stop.is_set():
            reply = cluster.chat(content, max_tokens=TOKENS, stream=number >= 4)
            if reply.status != 200:
                assert (reply.status, reply.error["code"]) == (503, "replica_died")
                assert int(reply.headers["Retry-After"]) >= 1
                ends["refused"] += 1
            elif number >= 4 and "error" in reply.events[-1]:
                assert reply.events[-1]["error"]["code"] == "replica_died"
                ends["broken off"] += 1
            else:
                assert text_of(reply) == expected[number % 4].text
                ends["answered"] += 1

    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(load, number) for number in range(8)]
        time.sleep(1.0)
        seen = len(cluster.lines)
        os.kill(min(before), signal.SIGKILL)
        cluster.line("1 of 2 replicas run.", seen)
        cluster.line("2 of 2 replicas run.", seen)
        time.sleep(0.5)
        stop.set()
        for one in running:
            one.result()
    assert ends["refused"] + ends["broken off"]
    assert ends["answered"] > 16
    assert len(replicas(cluster) - before) == 1
    counted = cluster.metric('visprune_refusals_total{code="replica_died"}')
    assert counted == ends["refused"] + ends["broken off"]
    assert cluster.metric("visprune_active_requests") == 0
    assert "which is a bug" not in "\n".join(cluster.lines)


def test_a_client_that_goes_away_leaves_nothing_active(cluster):
    for _ in range(4):
        with cluster.raw() as connection:
            body = b'{"model": "tiny", "stream": true, "messages": [{"role": "user", "content": "a"}]}'
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
            connection.sendall(b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body))
            connection.sendall(body)
            assert connection.recv(12) == b"HTTP/1.1 200"
    end = time.monotonic() + 30
    while cluster.metric("visprune_active_requests"):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_sigterm_lets_requests_finish_and_ends_the_replicas(cluster, square, expected):
    """The last test: the server ends."""
    content = [picture_part(data_url(square)), text_part(QUESTIONS[0])]
    ids = replicas(cluster)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(cluster.chat, content, max_tokens=TOKENS) for _ in range(4)]
        while not cluster.metric("visprune_active_requests") and not all(one.done() for one in running):
            time.sleep(0.002)
        assert cluster.stop() == 0
        replies = [one.result() for one in running]
    answered = [reply for reply in replies if reply.status == 200]
    assert answered
    assert {text_of(reply) for reply in answered} == {expected[0].text}
    late = [reply for reply in replies if reply.status != 200]  # they came after the signal
    assert all((reply.status, reply.error["code"]) == (503, "draining") for reply in late)
    assert not replicas(cluster)
    assert not any(Path(f"/proc/{number}").exists() for number in ids)


def test_a_cluster_that_is_not_there(tiny_bundle, monkeypatch, capfd):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert cli.run_command("serve", [str(tiny_bundle), "--replicas", "2"]) == 2
    assert "The Ray cluster 127.0.0.1:1 cannot be joined" in capfd.readouterr().err
