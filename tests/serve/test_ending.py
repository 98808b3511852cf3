"""How a server starts and ends: bad starts, clients that leave, signals, and the next start."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import Served, serving

from visprune import cli

# The tiny model is random: its answers are as long as they may be.
LONG = {"messages": [{"role": "user", "content": "Tell me."}], "max_tokens": 200}


@pytest.fixture
def start(tiny_bundle):
    """Start a server of the tiny model; it is killed when the test ends."""
    started = []

    def begin(*options):
        served = Served([tiny_bundle], *options)
        started.append(served)
        return served.ready()

    yield begin
    for served in started:
        served.process.kill()
        served.process.wait()


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving([tiny_bundle]) as served:
        yield served


def begun(served):
    """Return a connection on which an answer has begun to stream."""
    body = json.dumps({**LONG, "model": "tiny", "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    connection = socket.create_connection(("127.0.0.1", served.port), 60)
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    return connection


def until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


class TestStarts:
    """What is refused before anything is loaded."""

    def refused(self, capsys, *arguments):
        assert cli.run_command("serve", [str(one) for one in arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Loading" not in err
        first, second = err.splitlines()
        assert second.startswith("  ")
        return first

    def test_bundles(self, capsys, tmp_path, tiny_bundle):
        assert "is not a bundle" in self.refused(capsys, tmp_path)
        assert "is given twice" in self.refused(capsys, tiny_bundle, tiny_bundle)
        assert "Missing argument" in self.refused(capsys)

    def test_keys(self, capsys, tmp_path, tiny_bundle):
        missing = tmp_path / "keys.txt"
        assert "cannot be read" in self.refused(capsys, tiny_bundle, "--api-key-file", missing)
        missing.write_text("# none\n", encoding="utf-8")
        assert "There is no key" in self.refused(capsys, tiny_bundle, "--api-key-file", missing)
        assert "there are no keys" in self.refused(capsys, tiny_bundle, "--host", "0.0.0.0")

    def test_a_used_port(self, capsys, tiny_bundle):
        with socket.create_server(("127.0.0.1", 0)) as used:
            port = used.getsockname()[1]
            assert f"Port {port} of 127.0.0.1 is in use" in self.refused(capsys, tiny_bundle, "--port", port)

    def test_options(self, capsys, tiny_bundle):
        assert "--max-queue is -1" in self.refused(capsys, tiny_bundle, "--max-queue", -1)
        assert "no provider" in self.refused(capsys, tiny_bundle, "--provider", "cudda")
        assert "0 threads" in self.refused(capsys, tiny_bundle, "--threads", 0)
        assert "Cannot listen at 192.0.2.1" in self.refused(
            capsys, tiny_bundle, "--host", "192.0.2.1", "--no-auth"
        )

    def test_a_model_that_cannot_be_loaded(self, tiny_copy):
        graph = next(tiny_copy.rglob("*.onnx"))
        content = bytearray(graph.read_bytes())
        content[len(content) // 2] ^= 1
        graph.write_bytes(content)
        served = Served([tiny_copy])
        assert served.process.wait(60) == 2
        assert "error: " in served.lines[-2]
        assert "Traceback" not in "\n".join(served.lines)

    def test_models_that_stop_running_end_the_server(self, tiny_bundle):
        """A bug outside of any request. What started the server can start it again."""
        code = (
            "import sys, time; from visprune import cli; from visprune.serve.scheduler import Scheduler;"
            "Scheduler._advance = lambda self: time.sleep(2) or 1 / 0;"
            "sys.exit(cli.run_command('serve', sys.argv[1:]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(tiny_bundle), "--port", "0"],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 1
        assert "The models do not run any more." in done.stderr

    def test_several_models(self, tiny_bundle, demo_bundle):
        with serving([tiny_bundle, demo_bundle]) as served:
            assert served.models() == ["tiny", "uniform"]
            for name in served.models():
                assert served.chat("Tell me.", model=name).json["model"] == name


class TestClients:
    def test_one_that_leaves_is_not_answered_further(self, server):
        gone = 'visprune_requests_total{finish="client_gone",model="tiny"}'
        for _ in range(5):
            begun(server).close()
        until(lambda: server.metric("visprune_active_requests") == 0)
        until(lambda: server.metric(gone) > 0)
        assert "which is a bug" not in "\n".join(server.lines)

    def test_one_that_leaves_before_a_whole_answer(self, server):
        body = json.dumps({**LONG, "model": "tiny"}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        seen = len(server.lines)
        with server.raw() as connection:
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        server.line("client_gone", after=seen)
        until(lambda: server.metric("visprune_active_requests") == 0)

    def test_one_that_does_not_read_is_cut_off(self, start):
        """It asks for more than the buffers between the two can hold, and takes nothing of it."""
        served = start("--client-timeout", "1")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", served.port))
            connection.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 600)

            def is_cut():
                try:
                    connection.send(b"G")
                except OSError:
                    return True
                return False

            until(is_cut)
        assert served.get("/health/live").status == 200

    def test_the_log_has_no_texts(self, server):
        seen = len(server.lines)
        reply = server.chat("A secret question.", max_tokens=3)
        line = server.line("POST /v1/chat/completions 200", after=seen)
        assert f"{reply.json['usage']['prompt_tokens']} in" in line
        log = "\n".join(server.lines)
        assert "secret" not in log
        assert reply.json["choices"][0]["message"]["content"] not in log

    def test_unless_it_is_asked_for(self, start):
        served = start("--log-prompts")
        reply = served.chat("A secret question.", max_tokens=3)
        first = served.line("POST /v1/chat/completions")
        line = json.loads(served.line("secret"))
        time, client, name = first.split()[:3]
        assert client == "127.0.0.1"
        assert reply.json["id"] == f"chatcmpl-{name}"
        assert f" 200 - {reply.json['model']} " in first
        assert line == {
            "time": time,
            "client": client,
            "id": name,
            "model": reply.json["model"],
            "asked": [["A secret question."]],
            "answered": reply.json["choices"][0]["message"]["content"],
        }

    def test_a_refused_request_has_its_id_in_the_reply(self, server):
        seen = len(server.lines)
        reply = server.chat(n=2)
        name = reply.headers["X-Request-Id"]
        line = server.line(name, after=seen)
        assert line.split()[1:] == [
            *f"127.0.0.1 {name} POST /v1/chat/completions 400 unsupported_parameter -".split(),
            *line.split()[-2:],
        ]

    def test_a_path_cannot_write_lines(self, server):
        server.send(b"GET /a%0aGET%20/forged HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert server.line("forged").count("404") == 1
        assert not any(line.startswith("GET") for line in server.lines)


@pytest.fixture
def crowd():
    """Ask for more long answers than are computed at once."""
    with ThreadPoolExecutor(10) as pool:
        yield lambda served: [pool.submit(served.chat, model="tiny", **LONG) for _ in range(10)]


class TestSignals:
    def test_sigterm_lets_requests_finish(self, start, crowd):
        served = start()
        with begun(served) as connection:
            asked = crowd(served)
            until(lambda: served.metric("visprune_queued_requests") > 0)
            served.process.send_signal(signal.SIGTERM)
            served.line("Finishing")
            for path, method in (("/health/ready", "GET"), ("/v1/chat/completions", "POST")):
                reply = served.request(method, path, {} if method == "POST" else None)
                assert (reply.status, reply.error["code"]) == (503, "draining")
                assert reply.headers["Retry-After"]
            assert served.get("/health/live").json["state"] == "draining"
            text = b""
            while part := connection.recv(65536):
                text += part
        assert text.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        answers = {one.result().json["choices"][0]["message"]["content"] for one in asked}
        assert len(answers) == 1
        assert served.process.wait(60) == 0

    def test_one_request_is_one(self, start):
        served = start("--drain-timeout", "0")
        with begun(served):
            served.process.send_signal(signal.SIGTERM)
            served.line("Finishing 1 request. ")

    def test_those_that_take_too_long_are_told(self, start, crowd):
        served = start("--drain-timeout", "0")
        with begun(served) as connection:
            asked = crowd(served)
            until(lambda: served.metric("visprune_queued_requests") > 0)
            served.process.send_signal(signal.SIGTERM)
            text = b""
            while part := connection.recv(65536):
                text += part
        events = [line for line in text.decode().splitlines() if line.startswith("data: ")]
        if events[-1] != "data: [DONE]":  # it may have ended just before
            assert json.loads(events[-1][6:])["error"]["code"] == "draining"
        told = [one.result() for one in asked if one.result().status != 200]
        assert {(reply.status, reply.error["code"]) for reply in told} == {(503, "draining")}
        assert served.process.wait(60) == 0

    def test_ctrl_c(self, start):
        served = start()
        assert served.stop(signal.SIGINT) == 130
        assert served.lines[-1] == "Stopped."

    def test_a_second_signal_ends_at_once(self, start, crowd):
        served = start()
        with begun(served):
            asked = crowd(served)
            until(lambda: served.metric("visprune_queued_requests") > 0)
            served.process.send_signal(signal.SIGTERM)
            served.line("Finishing")
            served.process.send_signal(signal.SIGTERM)
            assert served.process.wait(60) == 128 + signal.SIGTERM
        assert any(one.exception() for one in asked)

    def test_the_next_start_works_after_kill(self, start, crowd, tiny_bundle):
        served = start()
        with begun(served):
            asked = crowd(served)
            until(lambda: served.metric("visprune_queued_requests") > 0)
            served.process.kill()
            assert any(one.exception() for one in asked)
        with serving([tiny_bundle], "--port", str(served.port)) as again:
            assert again.port == served.port
            assert again.chat("Tell me.").status == 200
