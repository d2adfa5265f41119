"""Address of a shared set: a repository of the hub, a folder of a web server, or a local folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from lad_dist import location
from lad_dist.errors import SharingError

HUB_FORM = "hf://OWNER/NAME"
FORMS = f"{HUB_FORM}, {HUB_FORM}@REVISION, https://HOST/FOLDER, or a folder"
_NAME = r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9_])?"
_HUB = re.compile(rf"hf://(?:datasets/)?(?P<repository>{_NAME}/{_NAME})/?(?:@(?P<revision>[\w][\w./-]*))?", re.ASCII)


@dataclass(frozen=True)
class HubAddress:
    """A data set repository of the hub, ``repository`` as OWNER/NAME; ``revision``: branch, tag or commit, None: main."""

    repository: str
    revision: str | None = None

    @property
    def name(self) -> str:
        return self.repository.partition("/")[2]

    def __str__(self) -> str:
        return f"hf://{self.repository}" + ("" if self.revision is None else f"@{self.revision}")


@dataclass(frozen=True)
class WebAddress:
    """A folder of a web server; ``url`` has no slash at its end."""

    url: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True)
class FolderAddress:
    """A local folder."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.resolve().name

    def __str__(self) -> str:
        return str(self.path)


Address = HubAddress | WebAddress | FolderAddress


def parse(text: str) -> Address:
    """Return what ``text`` names; text without ``://`` is a local folder. Raises SharingError for any other form."""
    if text.startswith("hf:"):
        found = _HUB.fullmatch(text)
        if found is None or re.search(r"--|\.\.", found["repository"]):
            raise SharingError(f"{text}: is not an address of the hub; valid: {HUB_FORM} or {HUB_FORM}@REVISION")
        return HubAddress(found["repository"], found["revision"])
    if not location.is_uri(text):
        return FolderAddress(Path(text).expanduser())
    parts = urlsplit(text)
    if location.has_credentials(text) or parts.query or parts.fragment:
        raise SharingError(
            f"{location.shown(text)}: an address holds no credentials, query or fragment; valid: {FORMS}"
        )
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return FolderAddress(location.local_folder(text))
    if parts.scheme in ("https", "http") and parts.netloc and parts.path.strip("/"):
        return WebAddress(text.rstrip("/"))
    raise SharingError(f"{text}: is not an address of a shared set; valid: {FORMS}")
