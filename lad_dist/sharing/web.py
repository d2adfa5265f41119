"""Shared sets as plain files of a web server."""

from __future__ import annotations

import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from lad_dist.errors import SharingError
from lad_dist.sharing.address import WebAddress
from lad_dist.sharing.contents import CARD, SUMS, listed

_SECONDS = 30.0  # without a byte
_ABSENT = (403, 404, 410)


def download(address: WebAddress, folder: Path) -> None:
    """Fetch the files that the address' SHA256SUMS lists, and the card, into an empty folder. Raises SharingError."""
    text = _got(address, SUMS)
    if text is None:
        raise SharingError(
            f"{address}: holds no shared set (no {SUMS}); valid: the address of a folder that lad-dist push wrote"
        )
    (folder / SUMS).write_bytes(text)
    for name in (*listed(text.decode("utf-8", "replace"), str(address)), CARD):
        content = _got(address, name)
        if content is not None:  # the check of the folder names what is missing
            (folder / name).write_bytes(content)


def _got(address: WebAddress, name: str) -> bytes | None:
    """Return a file's content; None where the server has no such file. Raises SharingError where it cannot be read."""
    url = f"{address}/{name}"
    try:
        with urllib.request.urlopen(url, timeout=_SECONDS) as answer:  # noqa: S310  # http or https: ``address.parse``
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        if error.code in _ABSENT:
            return None
        raise SharingError(f"{url}: the server answers {error.code} {error.reason}; try again") from error
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise SharingError(
            f"{url}: cannot be reached ({reason}); valid: a network connection, and an address that answers"
        ) from error
