"""Files of torch.save from elsewhere: their own checksums, and one clear error for whatever is wrong with them."""

from __future__ import annotations

import errno
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lad_dist.errors import LadDistError, first_line


def check_records(path: Path, *, stored: bool = False) -> None:
    """Compare the records of a file of torch's zip format with their checksums, which torch ignores.

    ``stored``: refuse compressed records. Raises ValueError; use it inside ``refused``.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if stored and any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
            raise ValueError("its records are compressed, which torch.save does not do")
        wrong = archive.testzip()
    if wrong is not None:
        raise ValueError(f"its record {wrong} does not match its checksum")


@contextmanager
def refused(path: Path, error: type[LadDistError], what: str, form: str) -> Iterator[None]:
    """Convert any error of reading ``path`` into an ``error`` that names it.

    ``what``: what was expected and what it needs, as ``a distilled set needs nothing but tensors``. ``form``: a valid file.
    """
    try:
        yield
    except LadDistError:  # an interruption, not a fault of the file
        raise
    except Exception as cause:  # a damaged file can raise any error in zipfile, the unpickler or torch
        if isinstance(cause, OSError) and cause.errno not in (None, errno.EINVAL):  # EINVAL: an offset beyond the file
            raise error(f"{path}: cannot be read: {cause.strerror}; valid: a readable file") from cause
        code = re.search(r"GLOBAL ([^\s]+)", str(cause))  # a name in the pickle that torch refuses to import
        if code:
            raise error(f"{path}: was not loaded: it asks for {code[1]}, and {what}; valid: {form}") from cause
        reason = first_line(cause)
        if "weights only" in reason.lower() or "weights_only" in reason:  # torch's message advises unsafe loading
            reason = "its pickle cannot be understood"
        raise error(f"{path}: is damaged, or not a file of torch.save: {reason}; valid: {form}") from cause
