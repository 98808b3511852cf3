"""Unusual requests that a client or a network may send: each gets an answer or a sentence, and none hangs."""

from __future__ import annotations

import http.client
import io
import json
import socket
import time

import pytest
from PIL import Image
from serving import data_url, picture_part, received, serving, text_part

PATH = "/v1/chat/completions"
QUESTION = {"model": "tiny", "messages": [{"role": "user", "content": "Tell me."}], "max_tokens": 3}
BODY = json.dumps(QUESTION).encode()
STREAM = json.dumps({**QUESTION, "stream": True}).encode()
HOST, LAST = b"Host: localhost\r\n", b"Connection: close\r\n"
JSON = b"Content-Type: application/json\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
GET = b"GET /health/live HTTP/1.1\r\n" + HOST
POST = f"POST {PATH} HTTP/1.1\r\n".encode() + HOST + JSON


@pytest.fixture(scope="module")
def server(tiny_bundle):
    with serving([tiny_bundle], "--client-timeout", "5") as served:
        yield served
        assert served.process.poll() is None
        log = "\n".join(served.lines)
        assert "Traceback" not in log
        assert "which is a bug" not in log
        assert served.chat("Tell me.").status == 200
        end = time.monotonic() + 60  # an answer is sent before its memory is free
        while served.metric("visprune_active_requests"):
            assert time.monotonic() < end


class _Received(io.BytesIO):
    """Bytes in the place of a connection. Replies are read from it one after another."""

    def makefile(self, mode):
        return self

    def close(self):
        """Stay open for the next reply."""


def replies(found, method):
    """The status and body of each reply in what a server sent; 100 Continue is left out."""
    file, parts = _Received(found), []
    while file.tell() < len(found):
        reply = http.client.HTTPResponse(file, method=method)
        reply.begin()
        parts.append((reply.status, reply.read()))
    return parts


class TestProtocol:
    @pytest.mark.parametrize(
        ("sent", "statuses"),
        [
            (GET + b"\r\n" + (GET + b"\r\n") * 2 + GET + LAST + b"\r\n", [200] * 4),
            ((POST + LENGTH + b"\r\n" + BODY) * 2 + POST + LAST + LENGTH + b"\r\n" + BODY, [200] * 3),
            (POST + b"Content-Length: 2\r\n\r\n{}" + GET + LAST + b"\r\n", [400, 200]),
            (b"GET /health/live HTTP/1.0\r\n\r\n", [200]),
            (f"POST {PATH} HTTP/1.0\r\n".encode() + JSON + LENGTH + b"\r\n" + BODY, [200]),
            (
                f"POST {PATH} HTTP/1.0\r\n".encode()
                + JSON
                + b"Content-Length: %d\r\n\r\n" % len(STREAM)
                + STREAM,
                [200],
            ),
            (POST + LAST + LENGTH + b"Expect: 100-continue\r\n\r\n" + BODY, [200]),
            (POST + LAST + LENGTH + b"Expect: a-reply\r\n\r\n" + BODY, [200]),
            (b"HEAD " + PATH.encode() + b" HTTP/1.1\r\n" + HOST + LAST + b"\r\n", [405]),
            (GET + LAST + b"Content-Length: 5\r\n\r\nhello", [200]),
            (b"CONNECT example.com:443 HTTP/1.1\r\n" + HOST + LAST + b"\r\n", [404]),
            (b"OPTIONS * HTTP/1.1\r\n" + HOST + LAST + b"\r\n", [404]),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [404, 400]),
            (GET + b"Upgrade: h2c\r\nConnection: Upgrade, close\r\n\r\n", [200]),
            (GET.replace(b"\r\n", b"\n") + b"Connection: close\n\n", [200]),
            (b"GET /health/live HTTP/1.1\r\n\r\n", [400]),
            (b"GET / HTTP/1.1\r\nHost : localhost\r\n" + LAST + b"\r\n", [400]),
            (b"GET /v1/\xff HTTP/1.1\r\n" + HOST + LAST + b"\r\n", [400]),
            (b"GET /v1/models/%ff%zz%00 HTTP/1.1\r\n" + HOST + LAST + b"\r\n", [404]),
            (b"GET /v1/models/" + b"a" * 20_000 + b" HTTP/1.1\r\n" + HOST + LAST + b"\r\n", [404]),
            (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", [400]),
            (POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", [400]),
            (POST + LAST + b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\nX: y\r\n\r\n", [400]),
            (POST + LENGTH + b"\r\n" + BODY + b"\0" * 1000 + b"\r\n\r\n", [200, 400]),
        ],
    )
    def test_what_is_sent(self, server, sent, statuses):
        method = sent.split()[0].decode()
        found = replies(server.send(sent), method)
        assert [status for status, _ in found] == statuses
        for status, body in found:
            if status >= 400 and method != "HEAD":
                error = json.loads(body)["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert len(error["message"]) < 400

    def test_a_connection_goes_on_after_an_error(self, server):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        connection.connect()
        first = connection.sock
        sent = [(b"{}", 400), (BODY, 200), (b"\0", 400), (BODY, 200)]
        for body, status in sent:
            connection.request("POST", PATH, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            assert (reply.status, bool(reply.read())) == (status, True)
        assert connection.sock is first
        connection.close()

    @pytest.mark.parametrize(
        "sent", [b"", POST, POST + LENGTH + b"\r\n" + BODY[:9], POST + LENGTH + b"\r\n" + BODY]
    )
    def test_a_client_that_ends_its_sending_half(self, server, sent):
        """It is taken for gone: a closed connection looks the same."""
        with server.raw() as connection:
            connection.settimeout(30)
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            received(connection)


def changed(**fields):
    return json.dumps({**QUESTION, **fields}).encode()


def raw(text):
    """The question with more fields, as they are."""
    return BODY[:-1] + b"," + text + b"}"


class TestBodies:
    @pytest.mark.parametrize(
        "body",
        [
            b"\xef\xbb\xbf" + BODY,
            BODY.decode().encode("utf-16"),
            BODY.decode().encode("utf-16-le"),
            BODY * 2,
            BODY[:-1] + b",}",
            BODY.replace(b"Tell", b"Te\nll"),
            b" \n",
            raw(b'"temperature":NaN'),
            raw(b'"temperature":-Infinity'),
            raw(b'"temperature":1e999'),
            raw(b'"top_p":1e-400'),
            raw(b'"seed":1' + b"0" * 5000),
            raw(b'"max_tokens":1' + b"0" * 4000),
            raw(b'"messages":[]'),
            raw(b'"\\udfff":1'),
            changed(model="x" * 100_000),
            changed(model="a\nb\x1b[31m"),
            changed(model="half \ud800"),
            changed(**{"k" * 100_000: 1}),
            changed(seed=2**70),
            changed(max_tokens=-5),
            changed(stop=["a"] * 1000),
            changed(stop=""),
            changed(visprune={"ratio": "0.5"}),
            changed(visprune={"ratio": True}),
            changed(visprune={"keep_tokens": 2**70}),
            changed(visprune=[]),
            changed(repetition_penalty=1e-300),
            changed(messages=[{"role": "narrator", "content": "a"}]),
            changed(messages=[{"role": None, "content": "a"}]),
            changed(messages=[{"role": [], "content": "a"}]),
            changed(messages=[{"role": "user", "content": []}]),
            changed(messages=[{"role": "user", "content": " \n"}]),
            changed(messages=[{"role": "user", "content": [{}]}]),
            changed(messages=[{"role": "user", "content": [{"type": "text", "text": ""}]}]),
            changed(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": "a.png"}]}]),
            changed(
                messages=[
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "\udfff"}}]}
                ]
            ),
            changed(messages=[{"role": "user", "content": "half \ud800"}]),
            changed(messages=[{"role": "user", "content": "<image>"}]),
            changed(messages=[{"role": "user"}, {"role": "user", "content": "a"}]),
            changed(response_format="json"),
            changed(
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "\ud800", "schema": {}},
                    "x": 1,
                }
            ),
            changed(
                response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "b"}}}
            ),
            changed(
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"$ref": "http://127.0.0.1/"}},
                }
            ),
        ],
    )
    def test_refused(self, server, body):
        reply = server.request("POST", PATH, body)
        assert reply.status in (400, 404)
        assert 20 < len(reply.error["message"]) < 400
        assert "\n" not in reply.error["message"]
        assert len(reply.error["param"] or "") <= 200

    @pytest.mark.parametrize(
        "body",
        [
            raw(b'"max_tokens":2'),  # twice: the last one counts
            raw(b'"temperature":1e-320'),
            changed(temperature=2, top_p=1e-300, top_k=2**80, seed=2**63 - 1),
            changed(repetition_penalty=100, temperature=2, seed=1),
            changed(stop=["a"] * 16),
            changed(stop="a" * 100_000),
            changed(messages=[{"role": "user", "content": "a\0b \U0001f600 \u202e"}]),
            changed(messages=[{"role": "user", "content": "a"}] * 3),
            changed(messages=[*QUESTION["messages"], {"role": "assistant"}, *QUESTION["messages"]]),
            changed(
                messages=[
                    *QUESTION["messages"],
                    {"role": "assistant", "content": None},
                    *QUESTION["messages"],
                ]
            ),
            changed(metadata={"a:b": "\udfff"}),
            changed(stream=None, response_format=None, visprune=None, stop=None),
        ],
    )
    def test_answered(self, server, body):
        reply = server.request("POST", PATH, body)
        assert reply.status == 200
        assert reply.json["usage"]["completion_tokens"] <= 3


class TestPictures:
    def ask(self, server, url):
        content = [picture_part(url), text_part("What?")]
        reply = server.request("POST", PATH, changed(messages=[{"role": "user", "content": content}]))
        if reply.status != 200:
            assert reply.status == 400
            assert reply.error["param"] == "messages[0].content[0].image_url.url"
        return reply

    @pytest.mark.parametrize("size", [(1, 1), (1, 100), (700, 7), (3000, 3000)])
    def test_sizes(self, server, size):
        assert self.ask(server, data_url(Image.new("RGB", size))).status == 200

    @pytest.mark.parametrize("size", [(1, 101), (2400, 1), (20, 20_000)])
    def test_one_like_a_thread(self, server, size):
        reply = self.ask(server, data_url(Image.new("RGB", size)))
        assert "too elongated" in reply.error["message"]

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16", "CMYK"])
    def test_modes(self, server, mode):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert self.ask(server, data_url(Image.new(mode, (20, 30)), kind)).status == 200

    @pytest.mark.parametrize("before", [" ", "\n", "\u00a0", "x"])
    def test_a_url_with_something_before_it(self, server, before):
        reply = self.ask(server, before + data_url(Image.new("RGB", (9, 9))))
        assert "is no data: URL" in reply.error["message"]

    def test_a_picture_that_is_cut_short(self, server):
        whole = data_url(Image.effect_noise((90, 90), 50), "JPEG")
        for share in (0.02, 0.3, 0.9):
            assert self.ask(server, whole[: int(len(whole) * share)]).status == 400
