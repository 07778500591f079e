"""Names of patients, studies and files that leave nothing behind: a keyed hash under the site's own key.

Without the key a name cannot be found again by trying all record numbers, as it could be with a plain hash. The same
key gives the same names everywhere, so packs of one site can be joined by patient.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from functools import cache
from pathlib import Path
from typing import NamedTuple

from otcxr.errors import ConfigError
from otcxr.files import storage_error

__all__ = ["SiteKey", "config_folder", "site_key"]

_BYTES = 32


class SiteKey(NamedTuple):
    """A secret and where it lies."""

    secret: bytes
    path: Path

    def name(self, kind: str, text: str) -> str:
        """Twenty hexadecimal digits of HMAC-SHA-256 over ``kind`` and ``text``.

        Two of a million names agree by chance with a probability of 4 * 10^-13.
        """
        return hmac.new(self.secret, f"{kind}\0{text}".encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[
            :20
        ]

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that tell keys apart and say nothing about them."""
        return hashlib.sha256(b"otcxr site key\0" + self.secret).hexdigest()[:16]


def config_folder() -> Path:
    """``otcxr`` in the user's configuration folder: $XDG_CONFIG_HOME, else ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "otcxr"


def site_key(path: Path | None = None) -> SiteKey:
    """Read the site's key; make it on first use, for the user's eyes only (mode 600).

    Args:
        path: The file; None: ``site.key`` in ``config_folder()``.
    Raises: ConfigError: it holds no key, or others may read it. StorageError: it cannot be made.
    """
    return _read(config_folder() / "site.key" if path is None else path)


@cache
def _read(path: Path) -> SiteKey:
    if not path.exists():
        _make(path)
    try:
        text = path.read_text().strip()
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the key file {path} cannot be read: {error}; name another with --key") from error
    if mode & 0o077:
        raise ConfigError(f"others may read the key file {path} (mode {mode & 0o777:o}); run: chmod 600 {path}")
    try:
        secret = bytes.fromhex(text)
    except ValueError:
        secret = b""
    if len(secret) != _BYTES:
        raise ConfigError(f"{path} holds no key: expected {2 * _BYTES} hexadecimal digits; name another with --key")
    return SiteKey(secret, path)


def _make(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # exclusive, and closed to others from its first moment; a second process that makes it too is told that it is
        # there and reads what the first one wrote
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(_BYTES) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    except OSError as error:
        raise storage_error(path, error) from error
