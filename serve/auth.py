"""Keys of clients: read from a file, and compared in a time that does not depend on them."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from visprune.errors import InputError

__all__ = ["Keys"]

_MAX_BYTES = 1_000_000  # of the file


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys that clients may send. Without any, everyone may ask.

    Attributes:
        digests: SHA-256 of each key, so that no key stays in memory.
    """

    digests: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Read a file of keys, one a line. Empty lines, and lines that begin with #, are left out.

        Raises:
            InputError: The file cannot be read, has no key, or a key cannot be sent in a header.
        """
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_BYTES + 1).decode("utf-8")
        except OSError as error:
            raise InputError(
                f"The keys {path} cannot be read: {error.strerror}.", "Check the path."
            ) from None
        except UnicodeDecodeError:
            raise InputError(f"The keys {path} are not UTF-8.", "Write one key a line.") from None
        if len(text) > _MAX_BYTES:
            raise InputError(f"The file of keys {path} is larger than 1 MB.", "Write one key a line.")
        lines = [line.strip() for line in text.splitlines()]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise InputError(f"There is no key in {path}.", "Write one a line, such as: openssl rand -hex 32")
        for number, line in enumerate(lines, 1):
            if line in keys and not (line.isascii() and line.isprintable() and " " not in line):
                raise InputError(
                    f"Line {number} of {path} is no key.",
                    "Use letters, digits and signs of ASCII, without spaces.",
                )
        return cls(tuple(sha256(key.encode()).digest() for key in keys))

    @property
    def any(self) -> bool:
        """Whether a key is needed."""
        return bool(self.digests)

    def allow(self, authorization: bytes | None) -> bool:
        """Return whether a request may be answered.

        Args:
            authorization: Value of its header Authorization, or None.
        """
        if not self.any:
            return True
        kind, _, sent = (authorization or b"").strip().partition(b" ")
        digest = sha256(sent.strip()).digest()
        # All keys are compared, so that the time does not tell which of them is near.
        found = [hmac.compare_digest(digest, known) for known in self.digests]
        return kind.lower() == b"bearer" and any(found)
