"""Options of the server, keys, and the checks of a request's headers."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from visprune.errors import InputError, UsageError
from visprune.options import options_of
from visprune.runtime.vision.images import MAX_PIXELS
from visprune.serve.auth import Keys
from visprune.serve.errors import Refusal
from visprune.serve.limits import Hosts, check_head, check_site
from visprune.serve.options import ServeOptions
from visprune.units import read_bytes

DOCS = Path(__file__).parents[2] / "docs"
FILE = Path("keys.txt")


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "what"),
        [
            ({"port": -1}, "There is no port -1"),
            ({"port": 65536}, "There is no port 65536"),
            ({"max_active": 0}, "--max-active is 0"),
            ({"max_queue": -1}, "--max-queue is -1"),
            ({"max_tokens": 0}, "--max-tokens is 0"),
            ({"max_pixels": MAX_PIXELS + 1}, "--max-pixels is"),
            ({"queue_timeout": 0.0}, "--queue-timeout is 0"),
            ({"request_timeout": float("nan")}, "--request-timeout is nan"),
            ({"client_timeout": float("inf")}, "--client-timeout is inf"),
            ({"drain_timeout": -1.0}, "--drain-timeout is -1"),
            ({"max_body": "20XB"}, "--max-body 20XB is not a size"),
            ({"max_body": "0"}, "--max-body is 0"),
            ({"memory": "0MB"}, "--memory is 0"),
            ({"memory": "much"}, "--memory much is not a size"),
            ({"no_auth": True, "api_key_file": FILE}, "Both --no-auth and --api-key-file"),
            ({"host": "0.0.0.0"}, "can be reached from other machines, and there are no keys"),
            ({"host": "::"}, "can be reached from other machines"),
            ({"host": "192.168.1.2"}, "can be reached from other machines"),
            ({"host": "no such host"}, "There is no address"),
            ({"allow_url": ["http://a/"]}, "is not the name of a host"),
            ({"allow_host": [""]}, "is not the name of a host"),
        ],
    )
    def test_refused(self, options, what):
        with pytest.raises(UsageError, match=re.escape(what)):
            ServeOptions(**options)

    @pytest.mark.parametrize(
        "options",
        [
            {"host": "0.0.0.0", "api_key_file": FILE},
            {"host": "0.0.0.0", "no_auth": True},
            *({"host": host} for host in ("localhost", "127.0.0.5", "::1", "::ffff:127.0.0.1")),
            {"port": 0, "drain_timeout": 0.0, "max_queue": 0, "max_images": 0, "max_pixels": MAX_PIXELS},
        ],
    )
    def test_taken(self, options):
        ServeOptions(**options)

    @pytest.mark.parametrize(
        ("text", "size"),
        [("0", 0), ("12", 12), ("256MB", 256_000_000), ("1.5 gb", 1_500_000_000), ("3kB", 3000), ("7B", 7)],
    )
    def test_sizes(self, text, size):
        assert read_bytes("--memory", text) == size

    def test_the_documentation_names_every_option(self):
        text = (DOCS / "serve.md").read_text(encoding="utf-8")
        for field in options_of(ServeOptions):
            assert f"`--{field.name.replace('_', '-')}" in text


def test_the_command_imports_no_server():
    """`--help`, and a machine without the extra, need none of it."""
    code = (
        "import sys, visprune.serve, visprune.commands.serve;"
        "heavy = {'fastapi', 'uvicorn', 'pydantic', 'prometheus_client', 'numpy', 'PIL'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


class TestKeys:
    def test_from_a_file(self, tmp_path):
        file = tmp_path / "keys.txt"
        file.write_text("# of the kitchen\n\n  first-key  \r\nsecond/key==\n", encoding="utf-8")
        keys = Keys.read(file)
        for sent, allowed in [
            (b"Bearer first-key", True),
            (b"bearer  second/key== ", True),
            (b"Bearer first-ke", False),
            (b"Bearer first-key1", False),
            (b"Bearer ", False),
            (b"Bearer # of the kitchen", False),
            (b"Basic first-key", False),
            (b"first-key", False),
            (b"", False),
            (None, False),
        ]:
            assert keys.allow(sent) is allowed
        assert "first-key" not in repr(keys)

    def test_without_keys_all_may_ask(self):
        assert Keys().allow(None)

    @pytest.mark.parametrize(
        ("content", "what"),
        [
            (b"", "There is no key"),
            (b"# nothing\n\n", "There is no key"),
            (b"a key\n", "Line 1"),
            (b"# x\nk\xc3\xa4se\n", "Line 2"),
            (b"\xff\xfe", "not UTF-8"),
            (b"a\n" * 600_000, "larger than 1 MB"),
        ],
    )
    def test_bad_files(self, tmp_path, content, what):
        file = tmp_path / "keys.txt"
        file.write_bytes(content)
        with pytest.raises(InputError, match=what):
            Keys.read(file)

    def test_no_file(self, tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            Keys.read(tmp_path / "none")
        with pytest.raises(InputError, match="cannot be read"):
            Keys.read(tmp_path)


class TestHosts:
    """DNS rebinding: a page of another site whose name leads here."""

    def allowed(self, name, *, have_keys=False, **options):
        try:
            Hosts.of(ServeOptions(**options), have_keys=have_keys).check(name)
        except Refusal as refusal:
            return (refusal.status, refusal.code) != (421, "host_not_allowed")
        return True

    @pytest.mark.parametrize(
        "host",
        [b"127.0.0.1:8000", b"localhost", b"LOCALHOST:8000", b"[::1]:8000", b"192.168.1.7", b"a.localhost:1"],
    )
    def test_own(self, host):
        assert self.allowed(host)
        assert self.allowed(None)

    @pytest.mark.parametrize(
        "host",
        [
            b"evil.example",
            b"evil.example:8000",
            b"localhost.evil.example",
            b"127.0.0.1.evil.example",
            b"[::1].evil.example",
            b"",
        ],
    )
    def test_foreign(self, host):
        assert not self.allowed(host)
        assert not self.allowed(host, host="0.0.0.0", no_auth=True)

    def test_a_proxy_is_named(self):
        assert self.allowed(b"board.example:443", allow_host=["Board.example"])
        assert not self.allowed(b"other.example", allow_host=["board.example"])

    def test_keys_protect_a_server_that_has_any_name(self):
        assert self.allowed(b"board.example", have_keys=True, host="0.0.0.0", api_key_file=FILE)
        assert not self.allowed(b"board.example", have_keys=True, api_key_file=FILE)


class TestSites:
    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {b"sec-fetch-site": b"same-origin", b"origin": b"https://proxy.example", b"host": b"127.0.0.1"},
            {b"sec-fetch-site": b"none"},
            {b"origin": b"http://192.168.1.7:8000", b"host": b"192.168.1.7:8000"},
        ],
    )
    def test_own(self, headers):
        check_site(headers)

    @pytest.mark.parametrize(
        "headers",
        [
            {b"sec-fetch-site": b"cross-site"},
            {
                b"sec-fetch-site": b"same-site",
                b"origin": b"http://localhost:3000",
                b"host": b"localhost:8000",
            },
            {b"origin": b"http://localhost:3000", b"host": b"localhost:8000"},
            {b"origin": b"null", b"host": b"localhost:8000"},
            {b"origin": b"http://evil.example", b"host": b"192.168.1.7:8000"},
        ],
    )
    def test_foreign(self, headers):
        with pytest.raises(Refusal) as caught:
            check_site(headers)
        assert (caught.value.status, caught.value.code) == (403, "cross_site")


@pytest.mark.parametrize(
    ("headers", "path", "status"),
    [
        ([(b"a", b"b")] * 101, b"/", 431),
        ([(b"a", b"b" * 40_000)], b"/", 431),
        ([(b"a", b"b")], b"/" * 40_000, 431),
        ([(b"Authorization", b"Bearer a"), (b"authorization", b"Bearer b")], b"/", 400),
        ([(b"host", b"a"), (b"host", b"b")], b"/", 400),
    ],
)
def test_heads(headers, path, status):
    with pytest.raises(Refusal) as caught:
        check_head(headers, path)
    assert caught.value.status == status
