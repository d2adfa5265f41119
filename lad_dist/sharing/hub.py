"""The Hugging Face hub: the only file that imports huggingface_hub.

The library's own environment counts: HF_TOKEN, HF_ENDPOINT, HF_HOME (its cache), HF_HUB_OFFLINE.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lad_dist import extras
from lad_dist.errors import SharingError, first_line
from lad_dist.sharing.address import HUB_FORM, HubAddress

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_KIND = "dataset"
_OF_THE_HUB = (".gitattributes",)  # made by the hub in every repository
_UNAUTHORIZED = (401, 403)

Refuse = Callable[[Collection[str], str | None], None]  # of the names and the checksums that are there


def download(address: HubAddress, names: Sequence[str], again: bool = False) -> Path:
    """Return a folder of the library's cache with those of the files ``names`` that the repository has.

    What is cached is not fetched again, unless ``again``. Raises SharingError.
    """
    api = _api(address)
    with _explained(address, api), _bars_on_terminals():
        found = api.snapshot_download(
            address.repository,
            repo_type=_KIND,
            revision=address.revision,
            allow_patterns=list(names),
            force_download=again,
        )
    return Path(found)


def upload(
    address: HubAddress, folder: Path, names: Sequence[str], sums: str, card: str, private: bool, refuse: Refuse
) -> str:
    """Commit the files of ``folder`` to the repository as one commit; create it if needed. Return the commit's id.

    ``names``: files that a set may have; those that this one lacks are deleted. Other files of the repository stay.
    ``sums``, ``card``: names of the files with checksums and text. ``refuse`` raises where what is there is to stay.

    Raises SharingError: no token, or one without the right; a public repository where ``private`` is asked for.
    """
    api = _api(address)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_token

    if get_token() is None:
        raise SharingError(
            f"{address}: pushing needs a token of {api.endpoint}; valid: HF_TOKEN in the environment, or `hf auth login`"
        )
    with _explained(address, api), _bars_on_terminals():
        api.create_repo(address.repository, repo_type=_KIND, private=private or None, exist_ok=True)
        info = api.dataset_info(address.repository)
        if private and not info.private:
            raise SharingError(f"{address}: is public already; valid: another name, or no --private")
        there = {file.rfilename for file in info.siblings or ()} - {*_OF_THE_HUB, card}
        kept = None
        if sums in there:
            local = api.hf_hub_download(address.repository, sums, repo_type=_KIND, revision=info.sha)
            kept = Path(local).read_text(encoding="utf-8", errors="replace")
            there &= set(names)
        refuse(there, kept)
        ours = sorted(file.name for file in folder.iterdir())
        gone = sorted(there.intersection(names).difference(ours))
        done = api.create_commit(
            address.repository,
            [
                *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in ours),
                *(CommitOperationDelete(path_in_repo=name) for name in gone),
            ],
            commit_message="Distilled set, by lad-dist",
            repo_type=_KIND,
            parent_commit=info.sha,  # refused where somebody else pushed meanwhile
        )
    return str(done.oid)


def _api(address: HubAddress) -> HfApi:
    """Return a client of the endpoint. Raises SharingError where the library is not installed."""
    if not extras.installed("huggingface_hub"):
        raise extras.missing("huggingface_hub", "hub", f"{address}: the hub", SharingError)
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="lad-dist")


@contextmanager
def _bars_on_terminals() -> Iterator[None]:
    """Keep the library's progress bars out of logs and pipes."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _explained(address: HubAddress, api: HfApi) -> Iterator[None]:
    """Turn the library's errors into one line each."""
    from httpx2 import HTTPError  # what the library lets through where there is no connection
    from huggingface_hub import errors

    at = api.endpoint
    try:
        yield
    except errors.GatedRepoError as error:
        raise SharingError(
            f"{address}: its owner grants access on request; ask at {at}/datasets/{address.repository}, then set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise SharingError(
            f"{address}: {at} has no such data set, or HF_TOKEN does not open it; valid: {HUB_FORM} of a data set that "
            "exists, and the token of someone who may read it"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise SharingError(
            f"{address}: has no revision {address.revision}; valid: a branch, a tag or a commit"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _failed(address, at, error.__cause__ or error) from error
    except (HTTPError, ConnectionError) as error:
        raise _failed(address, at, error) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise SharingError(f"{address}: {first_line(error)}") from error


def _failed(address: HubAddress, at: str, error: BaseException) -> SharingError:
    """Return the error of a request that was refused, or that reached nobody."""
    response = getattr(error, "response", None)
    if response is None:
        return SharingError(
            f"{address}: {at} cannot be reached ({first_line(error)}); valid: a network connection, or HF_ENDPOINT of a "
            "hub that answers"
        )
    if response.status_code in _UNAUTHORIZED:
        return SharingError(
            f"{address}: {at} refuses the token ({response.status_code}); valid: an HF_TOKEN with the right to write to "
            f"{address.repository}"
        )
    said = getattr(error, "server_message", None) or first_line(error)
    return SharingError(f"{address}: {at} answers {response.status_code}: {said}; try again, or see its status page")
