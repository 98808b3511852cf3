"""Pictures of other hosts: which may be fetched, and what a host may do."""

from __future__ import annotations

import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from visprune.errors import InputError, VispruneError
from visprune.serve.fetch import Fetcher, is_public
from visprune.serve.pictures import PictureReader

CONTENT = b"content of a picture" * 100


class Host(BaseHTTPRequestHandler):
    """A host whose paths do what their names say."""

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        port = self.server.server_address[1]
        places = {
            "/to-picture": "/picture",
            "/to-another-host": "http://elsewhere.example/picture",
            "/to-a-private-address": f"http://10.0.0.1:{port}/picture",
            "/to-this-machine": "http://127.0.0.1:1/picture",
            "/to-a-file": "file:///etc/passwd",
            "/loop": "/loop",
        }
        if self.path in places:
            self.send_response(302)
            self.send_header("Location", places[self.path])
            self.end_headers()
        elif self.path == "/missing":
            self.send_error(404)
        elif self.path == "/drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
            while not self.server.ended.wait(0.02):
                try:
                    self.wfile.write(b"x")
                except OSError:
                    return
        else:
            self.send_response(200)
            length = 10 if self.path == "/short" else 0
            self.send_header("Content-Length", str(len(CONTENT) + length))
            self.end_headers()
            self.wfile.write(CONTENT)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def host():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.asked, server.ended = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.ended.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    """A host that speaks HTTPS, and the file of its certificate, which nobody has signed."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    made = f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost -out {certificate}"
    names = ["-keyout", str(key), "-addext", "subjectAltName=DNS:localhost"]
    subprocess.run([*made.split(), *names], check=True, capture_output=True)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    server.asked, server.ended = [], threading.Event()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    server.handle_error = lambda *_: None  # a client that does not trust the certificate goes away
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_address[1], certificate
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def address(host):
    return f"localhost:{host.server_address[1]}"


@pytest.fixture
def fetcher(address):
    """Fetches from the host of this module, although it is on this machine, but from no other there."""

    def allowed(found):
        return found.is_loopback

    return replace(Fetcher.of([address.upper()], 10_000), allowed=allowed)


def test_a_picture(fetcher, address, host):
    host.asked.clear()
    assert fetcher.fetch(f"http://{address}/picture?a=b#c") == CONTENT
    assert fetcher.fetch(f"http://{address}/to-picture") == CONTENT
    assert host.asked == [(path, address) for path in ("/picture?a=b", "/to-picture", "/picture")]


@pytest.mark.parametrize(
    ("path", "what"),
    [
        ("to-another-host", "not fetched from elsewhere.example"),
        ("to-a-private-address", "not fetched from 10.0.0.1"),
        ("to-this-machine", "not fetched from 127.0.0.1"),
        ("to-a-file", "URL cannot be used"),
        ("loop", "more than 3 times"),
        ("missing", "status 404"),
        ("short", "cannot be fetched"),
    ],
)
def test_what_a_host_may_not_do(fetcher, address, path, what):
    with pytest.raises(InputError, match=what):
        fetcher.fetch(f"http://{address}/{path}")


def test_too_large(fetcher, address):
    with pytest.raises(InputError, match="larger than 100 B"):
        replace(fetcher, max_bytes=100).fetch(f"http://{address}/picture")
    assert replace(fetcher, max_bytes=len(CONTENT)).fetch(f"http://{address}/picture") == CONTENT


def test_too_slow(fetcher, address):
    """Every read gives something, so that only a limit for all of them ends it."""
    with pytest.raises(InputError, match="cannot be fetched"):
        replace(fetcher, seconds=0.5).fetch(f"http://{address}/drip")


def test_nothing_listens(fetcher):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        name = f"localhost:{free.getsockname()[1]}"
        with pytest.raises(InputError, match="cannot be fetched"):
            replace(fetcher, hosts=frozenset({name})).fetch(f"http://{name}/")


def test_certificates_are_checked(fetcher, secure, monkeypatch):
    port, certificate = secure
    names = frozenset({f"localhost:{port}", f"127.0.0.1:{port}"})
    allowing = replace(fetcher, hosts=names)
    with pytest.raises(InputError, match="cannot be fetched"):
        allowing.fetch(f"https://localhost:{port}/picture")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    assert allowing.fetch(f"https://localhost:{port}/picture") == CONTENT
    with pytest.raises(InputError, match="cannot be fetched"):  # it is the certificate of another name
        allowing.fetch(f"https://127.0.0.1:{port}/picture")


@pytest.mark.parametrize("host_name", ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433", "127.1"])
def test_an_allowed_name_of_this_machine_is_refused(host_name):
    """The operator may name a host whose address turns out to be private."""
    with pytest.raises(InputError, match=r"not public|not known"):
        Fetcher.of([host_name.strip("[]")], 100).fetch(f"http://{host_name}/")


@pytest.mark.parametrize(
    ("url", "helps"),
    [
        ("https://example.com/x.png", True),
        ("http://8.8.8.8/x.png", True),
        ("http://127.0.0.1/x.png", False),
        ("http://10.0.0.1:8080/x.png", False),
        ("http://[::1]/x.png", False),
        ("http://localhost/x.png", False),
        ("http://127.0.0.2/x.png", False),  # an allowed one
        ("http://user@photos.example.com/x.png", False),
    ],
)
def test_the_option_is_named_only_where_it_helps(url, helps):
    with pytest.raises(InputError) as caught:
        Fetcher.of(["photos.example.com", "127.0.0.2"], 100).fetch(url)
    assert ("--allow-url" in caught.value.hint) == helps
    assert "data: URL" in caught.value.hint


@pytest.mark.parametrize(
    "url",
    [
        "http://photos.example.com@127.0.0.1/",
        "http://user:secret@photos.example.com/",
        "http://photos.example.com:22/",
        "http://photos.example.com:99999/",
        "http://photos.example.com.evil.example/",
        "http://evil.example/photos.example.com",
        "http://photos.example.com%2f@evil.example/",
        "http:///photos.example.com",
        "http://photos.example.com/a b",
        "http://photos.example.com/\r\nHost: x",
        "http://photos.example.com/\u00e4",
        "ftp://photos.example.com/",
        "http://[::1",
        "http://photos.example.com/" + "a" * 3000,
    ],
)
def test_urls_that_only_look_allowed(url):
    with pytest.raises(InputError, match=r"cannot be used|not fetched"):
        Fetcher.of(["photos.example.com"], 100).fetch(url)


@pytest.mark.parametrize(
    "text",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0"),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1"),
        *("::1", "::", "fe80::1", "fc00::1", "fd12::1", "ff02::1", "2001:db8::1", "fec0::1"),
        *("::ffff:8.8.8.8", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "::127.0.0.1"),
        "2001:0:1::1",
    ],
)
def test_addresses_that_are_not_public(text):
    assert not is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", ["8.8.8.8", "93.184.216.34", "2606:2800:220:1:248:1893:25c8:1946"])
def test_public_addresses(text):
    assert is_public(ipaddress.ip_address(text))


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "/etc/passwd", "cat.png", "ftp://h/cat.png", "", "javascript:1", "FILE:/x"]
)
def test_no_file_is_opened(url):
    with pytest.raises(VispruneError, match="opens neither files nor other schemes"):
        PictureReader(Fetcher.of(["h"], 100), 100).read(url)
