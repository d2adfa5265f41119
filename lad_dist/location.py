"""Location of a trajectory buffer as text: a local folder, or the URI of an object store (``s3://bucket/prefix``).

URIs are parsed, joined and redacted here; ``trajectories/files.py`` opens them.
"""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from lad_dist.errors import TrajectoryError

# ``KEY:SECRET@`` up to the last @, to also hide a secret whose slashes were not percent-encoded.
_USER = re.compile(r"(?<=://)(?:[^/?#]*:.*@|[^/?#]*@)", re.DOTALL)
_SECRET_FIELD = re.compile("key|secret|token|sig|pass|cred", re.IGNORECASE)
_ANONYMOUS = "anonymous@"  # Arrow's marker in a gs:// URI for access without credentials


def is_uri(location: Path | str) -> bool:
    """Whether a location is a URI; everything else is a local folder."""
    return isinstance(location, str) and "://" in location


def is_remote(location: Path | str) -> bool:
    """Whether a location is a URI that is not local (``file:///folder`` is local)."""
    return is_uri(location) and not str(location).lower().startswith("file://")


def local_folder(location: Path | str) -> Path:
    """Return the folder of a local location. Raises ``TrajectoryError`` for a file URI with a host."""
    if not is_uri(location):
        return Path(location)
    parts = urlsplit(str(location))
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise TrajectoryError(f"{shown(location)}: is not a URI of a local folder; valid: file:///absolute/folder")
    return Path(unquote(parts.path))


def joined(location: Path | str, name: str) -> Path | str:
    """Append ``name`` to the path of ``location``, keeping its query."""
    if not is_uri(location):
        return Path(location) / name
    base, mark, query = str(location).partition("?")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def has_credentials(location: Path | str) -> bool:
    """Whether a URI has secrets not to be shown or stored: ``s3://KEY:SECRET@...``, or a query field like ``token``."""
    if not is_uri(location):
        return False
    user = _USER.search(str(location))
    return (user is not None and user[0] != _ANONYMOUS) or _secret_query(str(location))


def shown(location: Path | str) -> str:
    """Return a location for messages: without credentials, and without a query that has some."""
    text = str(location)
    if not has_credentials(location):
        return text
    text = _USER.sub("", text)
    return text.partition("?")[0] if _secret_query(text) else text


def _secret_query(text: str) -> bool:
    fields = parse_qsl(text.partition("?")[2], keep_blank_values=True)
    return any(_SECRET_FIELD.search(name) for name, _ in fields)
