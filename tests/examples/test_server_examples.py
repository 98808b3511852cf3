"""The systemd unit and the proxy of the examples, read by systemd and nginx where these are installed."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from visprune.options import options_of
from visprune.serve.options import ServeOptions
from visprune.units import read_bytes

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
UNIT = (EXAMPLES / "visprune-serve.service").read_text(encoding="utf-8")
PROXY = (EXAMPLES / "visprune-serve.nginx.conf").read_text(encoding="utf-8")
DEFAULTS = {field.name: field.default for field in options_of(ServeOptions)}


def seconds(pattern, text):
    return int(re.search(pattern, text, re.MULTILINE).group(1))


def test_the_examples_give_options_that_there_are():
    given = set(re.findall(r"--([a-z-]+) ", " ".join((*UNIT.split("ExecStart=")[1:], PROXY))))
    assert {"api-key-file", "allow-host"} <= given
    assert {name.replace("-", "_") for name in given} <= set(DEFAULTS)


def test_the_limits_of_the_examples_are_those_of_the_server():
    assert seconds(r"^TimeoutStopSec=(\d+)$", UNIT) > seconds(r"--drain-timeout (\d+)", UNIT)
    assert seconds(r"proxy_read_timeout (\d+)s", PROXY) > DEFAULTS["request_timeout"]
    assert seconds(r"client_max_body_size +(\d+)m", PROXY) * 2**20 >= read_bytes("", DEFAULTS["max_body"])


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    unit = tmp_path / "visprune-serve.service"
    unit.write_text(re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT, flags=re.MULTILINE))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not (shutil.which("nginx") and shutil.which("openssl")), reason="needs nginx and openssl")
def test_nginx_takes_the_proxy(tmp_path):
    command = (
        "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 1 -subj /CN=localhost"
    )
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    site = re.sub(r"/etc/\S+fullchain.pem", str(tmp_path / "cert.pem"), PROXY)
    site = re.sub(r"/etc/\S+privkey.pem", str(tmp_path / "key.pem"), site)
    site = re.sub(r"listen \[::\]:\d+.*;", "", site)
    for number in ("80", "443"):  # nginx listens at them even to check the file
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            site = site.replace(f"listen {number}", f"listen 127.0.0.1:{free.getsockname()[1]}")
    (tmp_path / "site.conf").write_text(site)
    folders = "\n".join(
        f"{name}_temp_path {tmp_path / name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; events {{}} http {{ access_log off; {folders} include {tmp_path}/site.conf; }}"
    )
    done = subprocess.run(
        ["nginx", "-t", "-c", str(tmp_path / "nginx.conf"), "-e", str(tmp_path / "log")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
