"""What a hostile client, page or picture tries, against a server with a key and short time limits."""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
import zlib
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image
from serving import data_url, picture_part, received, serving, text_part

KEY = "kitchen-8d1c0b"
POST = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n".encode()
JSON = b"Content-Type: application/json\r\n"
LAST = b"Connection: close\r\n\r\n"


@pytest.fixture(scope="module")
def server(demo_bundle, tmp_path_factory):
    """A server with a key and two places for requests, whose clients must be quick."""
    keys = tmp_path_factory.mktemp("keys") / "keys.txt"
    keys.write_text(f"# the kitchen\n{KEY}\nanother-key\n", encoding="utf-8")
    options = "--client-timeout 2 --max-active 1 --max-queue 1 --max-body 1MB --max-pixels 1000000"
    more = ("--api-key-file", str(keys), "--allow-url", "localhost", "--max-connections", "20")
    with serving([demo_bundle], *options.split(), *more, key=KEY) as served:
        yield served
        assert served.process.poll() is None
        log = "\n".join(served.lines)
        assert "Traceback" not in log
        assert "which is a bug" not in log
        assert KEY not in log
        assert "file:" not in log
        assert served.chat("Tell me.").status == 200
        assert served.metric("visprune_active_requests") == 0


class TestKeys:
    @pytest.mark.parametrize("sent", [None, "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY} x"])
    @pytest.mark.parametrize(
        ("method", "path"),
        [
            ("GET", "/v1/models"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/metrics"),
            ("GET", "/v1/nothing"),
            ("GET", "/%76%31/models"),
            ("GET", "//v1/models"),
            ("GET", "/page/../v1/models"),
        ],
    )
    def test_no_key_and_a_wrong_key(self, server, method, path, sent):
        key, server.key = server.key, None
        try:
            reply = server.request(method, path, headers={"Authorization": sent} if sent else {})
        finally:
            server.key = key
        if path.startswith("/page/"):
            assert reply.status == 404
            return
        assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
        assert reply.headers["WWW-Authenticate"].startswith("Bearer")
        assert KEY not in reply.body.decode()

    def test_a_key_is_needed_before_the_body_is_read(self, server):
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n" + JSON
        with server.raw() as connection:
            connection.sendall(head + b"\r\n")
            assert connection.recv(65536).startswith(b"HTTP/1.1 401")

    def test_each_key_is_taken(self, server):
        assert server.get("/v1/models").json["data"][0]["visprune"]["needs_auth"]
        assert (
            server.request("GET", "/v1/models", headers={"Authorization": "Bearer another-key"}).status == 200
        )

    @pytest.mark.parametrize("path", ["/", "/docs", "/openapi.json", "/health/live", "/health/ready"])
    def test_what_needs_none(self, server, path):
        key, server.key = server.key, None
        assert server.get(path).status == 200
        server.key = key


class TestPages:
    """Pages of other sites in somebody's browser, and the headers that make a browser careful."""

    @pytest.mark.parametrize("path", ["/", "/v1/models", "/nothing", "/health/live", "/page/none.js"])
    def test_headers_of_every_answer(self, server, path):
        headers = server.get(path).headers
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store"
        assert "Access-Control-Allow-Origin" not in headers
        assert "Server" not in headers

    def test_a_name_that_is_not_the_server_s(self, server):
        for path in ("/", "/v1/models"):
            reply = server.get(path, Host="evil.example")
            assert (reply.status, reply.error["code"]) == (421, "host_not_allowed")

    @pytest.mark.parametrize(
        "headers", [{"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}, {"Origin": "null"}]
    )
    def test_another_site(self, server, headers):
        reply = server.request("POST", "/v1/chat/completions", {}, headers)
        assert (reply.status, reply.error["code"]) == (403, "cross_site")

    def test_no_preflight_is_answered(self, server):
        reply = server.request(
            "OPTIONS",
            "/v1/chat/completions",
            headers={"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"},
        )
        assert reply.status == 403
        assert not any(name.startswith("access-control") for name in map(str.lower, reply.headers))

    @pytest.mark.parametrize(
        "name",
        [
            "../options.py",
            "..%2foptions.py",
            "%2e%2e/options.py",
            "....//options.py",
            "/etc/passwd",
            "%2fetc%2fpasswd",
            "..%5coptions.py",
            "index.html%00",
            "index.html/",
            "",
            ".",
        ],
    )
    def test_path_traversal(self, server, name):
        reply = server.get(f"/page/{name}")
        assert (reply.status, reply.error["code"]) == (404, "not_found")


class TestPictures:
    @pytest.mark.parametrize(
        ("url", "what"),
        [
            ("file:///etc/passwd", "opens neither files"),
            ("/etc/passwd", "opens neither files"),
            ("http://127.0.0.1/cat.png", "not fetched from 127.0.0.1"),
            ("http://169.254.169.254/latest/meta-data", "not fetched from 169.254.169.254"),
            ("http://localhost/cat.png", "not public"),
            ("https://localhost/cat.png", "not public"),
            ("http://localhost:22/", "not fetched from localhost:22"),
            ("https://example.com/cat.png", "not fetched from example.com"),
            ("ftp://localhost/cat.png", "opens neither files"),
        ],
    )
    def test_no_file_and_no_other_host(self, server, url, what):
        reply = server.chat([picture_part(url), text_part("a")])
        assert (reply.status, reply.error["code"]) == (400, "invalid_image")
        assert what in reply.error["message"]
        assert reply.error["param"] == "messages[0].content[0].image_url.url"

    def test_a_decompression_bomb(self, server):
        """A PNG of 30,000 x 30,000 pixels, in a few kilobytes."""
        side = 30_000
        rows = zlib.compressobj(9)
        packed = b"".join(rows.compress(b"\0" * (side // 8 + 1)) for _ in range(side)) + rows.flush()

        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
        file = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
        reply = server.chat([picture_part(f"data:image/png;base64,{base64.b64encode(file).decode()}")])
        assert reply.status == 400
        assert "more pixels" in reply.error["message"]

    def test_pixels_are_counted_over_all_pictures(self, server):
        picture = picture_part(data_url(Image.new("RGB", (800, 700))))
        assert server.chat([picture, text_part("a")]).status == 200
        reply = server.chat([picture, picture, text_part("a")])
        assert "more pixels" in reply.error["message"]
        assert reply.error["param"] == "messages[0].content[1].image_url.url"


class TestBodies:
    def test_10_000_messages(self, server):
        reply = server.chat(messages=[{"role": "user", "content": "a"}] * 10_000)
        assert (reply.status, reply.error["code"]) == (400, "too_many_messages")

    def test_deep_json(self, server):
        body = b'{"messages":' + b"[" * 200_000
        reply = server.request("POST", "/v1/chat/completions", body)
        assert (reply.status, reply.error["code"]) == (400, "invalid_json")

    def test_a_gigabyte_announced(self, server):
        """The refusal comes before anything of the body was sent."""
        with server.raw() as connection:
            connection.sendall(POST + JSON + b"Content-Length: 1000000000\r\n\r\n")
            reply = b""
            while b"request_too_large" not in reply:
                part = connection.recv(65536)
                assert part
                reply += part
        assert reply.startswith(b"HTTP/1.1 413")

    @pytest.mark.parametrize("connection", ["keep-alive", "close"])
    def test_a_large_body_is_dropped_and_its_client_sees_why(self, server, connection):
        headers = {"Connection": connection}
        reply = server.request("POST", "/v1/chat/completions", b" " * 30_000_000, headers)
        assert (reply.status, reply.error["code"]) == (413, "request_too_large")

    def test_a_large_body_in_chunks(self, server):
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        reply = server.send(
            POST + JSON + b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n", chunk * 20
        )
        assert reply.startswith(b"HTTP/1.1 413")

    @pytest.mark.parametrize(
        "length", [b"-1", b"1e3", b"9" * 400, b"5, 6", b"5\r\nTransfer-Encoding: chunked\r\nX: y"]
    )
    def test_strange_lengths(self, server, length):
        status = server.send(
            POST + JSON + b"Content-Length: " + length + b"\r\nConnection: close\r\n\r\n0\r\n\r\n"
        )
        assert status[9:12] in (b"400", b"413")

    def test_a_half_sent_body(self, server):
        reply = server.send(POST + JSON + b"Content-Length: 100\r\n\r\n" + b'{"model":')
        assert reply.startswith(b"HTTP/1.1 408")
        assert b"body_timeout" in reply

    def test_a_half_sent_head(self, server):
        reply = server.send(POST)
        assert reply.startswith(b"HTTP/1.1 408")
        assert b"head_timeout" in reply

    def test_a_silent_client(self, server):
        assert server.send() == b""
        assert server.send(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\n\r\n").count(b"HTTP/1.1") == 1

    @pytest.mark.parametrize(
        "flood",
        [
            b"X: y\r\n" * 200,
            b"X: " + b"y" * 50_000 + b"\r\n",
            b"".join(b"X-%d: %s\r\n" % (i, b"y" * 500) for i in range(90)),
        ],
    )
    def test_header_floods(self, server, flood):
        reply = server.send(POST + flood + LAST)
        assert reply.startswith(b"HTTP/1.1 431")
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"

    @pytest.mark.parametrize(
        "garbage",
        [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"hello\r\n\r\n", b"GET / HTTP/9\r\n\r\n"],
    )
    def test_what_is_no_http(self, server, garbage):
        reply = server.send(garbage + b"\r\n\r\n")
        assert reply.startswith(b"HTTP/1.1 400")
        assert b"invalid_http" in reply


class TestCrowds:
    def test_a_full_queue(self, server):
        """A request takes its place before its body is read: two that send slowly fill the server."""
        slow = POST + JSON + b"Content-Length: 100\r\n\r\n{"
        refused = []

        def is_refused():
            with server.raw() as first, server.raw() as second:
                first.sendall(slow)
                second.sendall(slow)
                reply = server.chat("a")
                assert b" 408 " in received(first)
                assert b" 408 " in received(second) or reply.status == 200
            refused.append(reply)
            return reply.status == 429

        _until(is_refused)
        assert refused[-1].error["code"] == "queue_full"
        assert int(refused[-1].headers["Retry-After"]) >= 1
        assert server.chat("a").status == 200

    def test_a_client_that_leaves_while_it_sends(self, server):
        for _ in range(5):
            with server.raw() as connection:
                connection.sendall(POST + JSON + b"Content-Length: 100\r\n\r\n{")
        _until(lambda: server.chat("a").status == 200)

    def test_too_many_connections(self, server):
        with ExitStack() as stack:
            crowd = [stack.enter_context(server.raw()) for _ in range(25)]
            crowd[-1].settimeout(10)
            reply = received(crowd[-1])
            assert reply.startswith(b"HTTP/1.1 503")
            assert b"too_many_connections" in reply
        _until(lambda: server.get("/health/live").status == 200)
        assert server.metric('visprune_refusals_total{code="too_many_connections"}') > 0


class _Elsewhere(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked += 1
        self.send_error(404)

    def log_message(self, *arguments):
        pass


def test_an_allowed_host_that_is_this_machine_is_never_asked(demo_bundle):
    """The operator allowed a name, and its address turns out to be private."""
    elsewhere = ThreadingHTTPServer(("127.0.0.1", 0), _Elsewhere)
    elsewhere.asked = 0
    threading.Thread(target=elsewhere.serve_forever, daemon=True).start()
    name = f"localhost:{elsewhere.server_address[1]}"
    with serving([demo_bundle], "--allow-url", name) as served:
        reply = served.chat([picture_part(f"http://{name}/cat.png"), text_part("a")])
        assert "not public" in reply.error["message"]
    assert elsewhere.asked == 0
    elsewhere.shutdown()
    elsewhere.server_close()


def _until(true):
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
