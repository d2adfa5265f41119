"""Where a trajectory buffer lies, as text: a local folder, or the URI of an object store (``s3://bucket/prefix``).

How a URI is opened is said in ``trajectories/files.py``; here it is only taken apart, joined, and made fit to be shown.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from lad_dist.errors import TrajectoryError

# ``KEY:SECRET@`` up to the last @: a secret whose slashes were not percent-encoded must not show either.
_USER = re.compile(r"(?<=://)(?:[^/?#]*:.*@|[^/?#]*@)", re.DOTALL)
_SECRET_FIELD = re.compile("key|secret|token|sig|pass|cred", re.IGNORECASE)
_ANONYMOUS = "anonymous@"  # Arrow's way to say in a gs:// URI that no credentials are wanted


def is_uri(location: Path | str) -> bool:
    """Whether a location is a URI; everything else is a local folder."""
    return isinstance(location, str) and "://" in location


def is_remote(location: Path | str) -> bool:
    """Whether a location is a URI of anything but a local folder (``file:///folder`` is one)."""
    return is_uri(location) and not str(location).lower().startswith("file://")


def local_folder(location: Path | str) -> Path:
    """The folder that a local location names. Raises ``TrajectoryError`` for a file URI with a host in it."""
    if not is_uri(location):
        return Path(location)
    parts = urlsplit(str(location))
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise TrajectoryError(f"{shown(location)}: is not a URI of a local folder; valid: file:///absolute/folder")
    return Path(unquote(parts.path))


def joined(location: Path | str, name: str) -> Path | str:
    """The location called ``name`` inside ``location``, which keeps its query."""
    if not is_uri(location):
        return Path(location) / name
    base, mark, query = str(location).partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def has_credentials(location: Path | str) -> bool:
    """Whether a URI carries what must not be shown or stored: ``s3://KEY:SECRET@...``, or a query field like ``token``."""
    if not is_uri(location):
        return False
    user = _USER.search(str(location))
    return (user is not None and user[0] != _ANONYMOUS) or _secret_query(str(location))


def shown(location: Path | str) -> str:
    """A location for messages: without credentials, and without its query if that holds some."""
    text = str(location)
    if not has_credentials(location):
        return text
    text = _USER.sub("", text)
    return text.partition("?")[0] if _secret_query(text) else text


def _secret_query(text: str) -> bool:
    fields = parse_qsl(text.partition("?")[2], keep_blank_values=True)
    return any(_SECRET_FIELD.search(name) for name, _ in fields)
