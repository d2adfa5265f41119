"""``replay_buffer_N.pt``: expert trajectories as the published code of MTT, DATM and LAD writes and reads them.

    OUT/first_stage/replay_buffer_0.pt      representation experts: what LAD's ``first_stage_expert_dir`` names
    OUT/second_stage/replay_buffer_0.pt     classifier experts: ``second_stage_expert_dir``
    OUT/lad_dist.json                       what the files were made from, so that an interrupted export continues

A file is a list of experts, each a list of checkpoints (epoch 0 to the last), each a list of float32 tensors in the order
of the network's ``parameters()``; numbers count from 0 without gaps, because readers stop at the first that is missing.
Both stages hold whole networks: the official second stage saves all parameters, the frozen backbone again in every
checkpoint, and its distillation takes the last two tensors (``[:-2]``) for the classifier. Our classifier rows hold the
classifier only, so export puts the backbone of the last representation checkpoint back, and import checks that it is there.

Sources: ``buffer.py`` and ``distill.py`` of GeorgeCazenavette/mtt-distillation; ``buffer/buffer_FTD.py`` and
``distill/DATM.py`` of NUS-HPC-AI-Lab/DATM; ``buffer/buffer_FTD.py``, ``utils/utils_two_stage.py`` and
``distill/DAM-ED_tesla.py`` of ichbill/LTDD.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lad_dist.errors import StorageError, TrajectoryError
from lad_dist.rundir import host_name, process_lives, published
from lad_dist.trajectories import claims
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.schema import STAGES, BufferMeta, Stage
from lad_dist.trajectories.writer import PartWriter

EXPERTS_PER_FILE = 10  # as in the published code (``save_interval``)
IMPORTED_FROM = "imported_from"  # the field of ``BufferMeta.versions`` that marks imported parts
FOLDERS: dict[Stage, str] = {"representation": "first_stage", "classifier": "second_stage"}
MANIFEST = "lad_dist.json"

_NAME = re.compile(r"replay_buffer_([0-9]+)\.pt")
_TEMPORARY = re.compile(r"\.tmp-(\w+)-([0-9]+)-\w+\.pt")
_LAST_EPOCH: dict[Stage, str] = {"representation": "epochs", "classifier": "classifier_epochs"}
_FORM = "a list of experts, each a list of checkpoints, each a list of tensors, as torch.save writes it"
_CHUNK = 2**20

Report = Callable[[str], None]
Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Imported:
    """What an import came to. ``experts``: how many each stage has now. ``written`` and ``present``: checkpoints that were
    added, and that were there before with the same weights. ``unused``: experts in the files beyond those asked for."""

    experts: dict[Stage, int]
    written: int
    present: int
    unused: dict[Stage, int]


# --- out ------------------------------------------------------------------------------------------------------------


def export_experts(
    buffer: Buffer,
    out: Path,
    experts_per_file: int = EXPERTS_PER_FILE,
    experts: Sequence[int] | None = None,
    force: bool = False,
    report: Report | None = None,
) -> list[Path]:
    """Write a buffer's experts as ``replay_buffer_N.pt`` files below ``out``; the files, in order.

    Expert number i of the whole is the i-th of ``experts`` (default: all of the buffer, ascending), in both stages. A
    buffer without a classifier stage gives the first stage only. Run again after an interruption, it keeps the files
    that are complete. ``force``: remove the ``replay_buffer_N.pt`` of another export (nothing else) instead of refusing.
    ``report`` is called with one line per file.

    Memory: one checkpoint (times two), however long the buffer. A file is put together in an unnamed temporary one beside
    it, so that the disk must hold it twice for a moment, and mapped from there, in pages that the system may drop.
    Peers' code needs a whole file in memory: a smaller ``experts_per_file`` helps it.

    Raises ``TrajectoryError`` if an expert is not complete, a checkpoint cannot be read, or files of something else are in
    the way; ``StorageError`` if the disk is full or refuses.
    """
    say = report or (lambda line: None)
    if experts_per_file < 1:
        raise TrajectoryError(f"experts_per_file is {experts_per_file}; valid: 1 or more")
    meta = buffer.meta
    stages = [stage for stage in STAGES if stage == "representation" or buffer.experts("classifier")]
    chosen = _complete(buffer, stages, experts)
    _make_way(out, _manifest(buffer, stages, chosen, experts_per_file), stages, force)
    written = []
    for stage in stages:
        chunks = [chosen[i : i + experts_per_file] for i in range(0, len(chosen), experts_per_file)]
        for number, chunk in enumerate(chunks):
            path = out / FOLDERS[stage] / f"replay_buffer_{number}.pt"
            kept = path.exists()
            if not kept:
                _write_file(path, buffer, meta, stage, chunk)
            size = f"{path.stat().st_size / 1e6:.1f} MB" + (", was there already" if kept else "")
            say(f"{path}: {stage} experts {', '.join(map(str, chunk))}, {size}")
            written.append(path)
    return written


def _complete(buffer: Buffer, stages: Sequence[Stage], experts: Sequence[int] | None) -> list[int]:
    """The experts to export. Raises ``TrajectoryError`` if one of them lacks an epoch."""
    last = last_epochs(buffer.meta)
    present = sorted({expert for stage in stages for expert in buffer.experts(stage)})
    chosen = present if experts is None else list(dict.fromkeys(experts))
    lacking = [
        f"{stage} expert {expert} ends at epoch {at} of {last[stage]}" if at is not None else f"{stage} expert {expert}"
        for expert in chosen
        for stage in stages
        if (at := buffer.last_contiguous_epoch(stage, expert)) is None or at < last[stage]
    ]
    if lacking or not chosen:
        whole = [e for e in present if not any(f"expert {e} " in f"{text} " for text in lacking)]
        raise TrajectoryError(
            f"{buffer.folder}: not all experts are complete ({'; '.join(lacking[:5]) or 'there is none'}"
            f"{'; ...' if len(lacking) > 5 else ''}); complete are {_listed(whole)}: export those, or make the rest with "
            "`lad-dist experts JOB`"
        )
    return chosen


def _manifest(buffer: Buffer, stages: Sequence[Stage], experts: Sequence[int], per_file: int) -> dict[str, Any]:
    """What determines the files; ``content`` is a sum over the sums of the parts that they are made from."""
    content = hashlib.sha256()
    for name in buffer.parts:
        if name.stage in stages and name.expert in experts:
            content.update(f"{name} {buffer.footer(name).data_sum}\n".encode())
    return {
        "experts_hash": buffer.meta.experts_hash,
        "experts": list(experts),
        "experts_per_file": per_file,
        "stages": list(stages),
        "parameters": [[name, list(shape)] for name, shape in buffer.meta.parameters],
        "content": content.hexdigest(),
    }


def _make_way(out: Path, manifest: dict[str, Any], stages: Sequence[Stage], force: bool) -> None:
    """Leave only this export's own files in ``out``, and its manifest. Raises as ``export_experts`` does."""
    path = out / MANIFEST
    folders = [out / FOLDERS[stage] for stage in STAGES]
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == manifest
    except (FileNotFoundError, NotADirectoryError, ValueError):
        same = False
    found = [file for folder in folders if folder.is_dir() for file in folder.iterdir() if _NAME.fullmatch(file.name)]
    if found and not (same or force):
        raise TrajectoryError(
            f"{found[0]}: is there, of another export or of other code, and is not overwritten; choose another folder, or "
            f"--force, which removes the {len(found)} replay_buffer_N.pt files in {out}"
        )
    if same:
        return _remove_leftovers(folders)
    with published(path) as temporary:
        for file in found:
            file.unlink()
        temporary.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _remove_leftovers(folders: Sequence[Path]) -> None:
    """Remove what a killed export of this host was writing."""
    for folder in folders:
        for file in folder.glob(".tmp-*.pt"):
            match = _TEMPORARY.fullmatch(file.name)
            if match and match[1] == host_name() and not process_lives(int(match[2])):
                file.unlink(missing_ok=True)


def _write_file(path: Path, buffer: Buffer, meta: BufferMeta, stage: Stage, experts: Sequence[int]) -> None:
    epochs = last_epochs(meta)[stage] + 1
    length = meta.vector_length("representation")
    with published(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as scratch:
        for expert in experts:
            for whole_P in _whole_networks(buffer, meta, stage, expert):
                scratch.write(whole_P.data)  # not through the mapping: a full disk would kill the process there
        scratch.flush()
        mapped = np.memmap(scratch, np.float32, mode="c", shape=(len(experts), epochs, length))
        content = [[_tensors(meta, mapped[i, epoch]) for epoch in range(epochs)] for i in range(len(experts))]
        with temporary.open("wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch reports a refused write as a wrong position in the file
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise


def _whole_networks(buffer: Buffer, meta: BufferMeta, stage: Stage, expert: int) -> Iterator[Vector]:
    """All weights (P,) at every epoch of one expert; in the classifier stage with the frozen backbone."""
    last = last_epochs(meta)
    if stage == "representation":
        for epoch in range(last[stage] + 1):
            yield buffer.read(stage, expert, epoch)
        return
    whole_P = buffer.read("representation", expert, last["representation"])
    in_classifier = _classifier_mask(meta)
    for epoch in range(last[stage] + 1):
        whole_P[in_classifier] = buffer.read(stage, expert, epoch)
        yield whole_P


# --- in -------------------------------------------------------------------------------------------------------------


def find_files(sources: Sequence[Path]) -> dict[Stage, tuple[Path, ...]]:
    """The replay buffers that ``sources`` name, by stage, in the order in which their experts are counted.

    A source is a ``replay_buffer_N.pt``; or a folder of them, taken in the order of N; or a folder with one folder
    ``first_stage*`` and one ``second_stage*`` of them (an export's, and LAD's own). Files in a folder called
    ``second_stage*`` or ``classifier*`` are classifier experts; all others, and so those of MTT and DATM, which have one
    stage, are representation experts. Nothing is opened. Raises ``TrajectoryError``.
    """
    found: dict[Stage, list[Path]] = {}
    for source in sources:
        if source.is_file():
            found.setdefault(_stage_of(source.absolute().parent), []).append(source)
            continue
        if not source.is_dir():
            raise TrajectoryError(f"{source}: does not exist; valid: a replay_buffer_N.pt, or a folder with some")
        folders = [source] if _numbered(source) else _stage_folders(source)
        for folder in folders:
            found.setdefault(_stage_of(folder.absolute()), []).extend(_numbered(folder))
    files = {stage: tuple(found[stage]) for stage in STAGES if stage in found}
    for paths in files.values():
        twice = next((p for i, p in enumerate(paths) if p.resolve() in [q.resolve() for q in paths[:i]]), None)
        if twice is not None:
            raise TrajectoryError(f"{twice}: is named twice; its experts would be counted twice")
    return files


def _stage_of(folder: Path) -> Stage:
    return "classifier" if folder.name.startswith(("second_stage", "classifier")) else "representation"


def _numbered(folder: Path) -> list[Path]:
    """The replay buffers right in ``folder``, in the order of their numbers. Raises ``TrajectoryError`` for a gap."""
    names = {int(match[1]): file for file in folder.iterdir() if (match := _NAME.fullmatch(file.name))}
    missing = sorted(set(range(len(names))) - set(names))
    if missing:
        raise TrajectoryError(
            f"{folder}/replay_buffer_{missing[0]}.pt: is missing, and experts are counted over the files in their order; "
            "name the files one by one if it should be left out, in both stages"
        )
    return [names[number] for number in sorted(names)]


def _stage_folders(source: Path) -> list[Path]:
    found = []
    for prefix in FOLDERS.values():
        folders = [f for f in sorted(source.glob(f"{prefix}*")) if f.is_dir() and _numbered(f)]
        if len(folders) > 1:
            raise TrajectoryError(f"{source}: has several {prefix} folders ({_listed(folders)}); name the one to take")
        found += folders
    if not found:
        raise TrajectoryError(
            f"{source}: holds no replay_buffer_N.pt; valid: a folder with some, or with first_stage and second_stage folders"
        )
    return found


class _File(NamedTuple):
    """A checked replay buffer. Its experts are ``first``, ``first + 1``, ... of the whole; ``count`` of them are taken."""

    path: Path
    origin: str
    first: int
    count: int


def import_experts(
    files: Mapping[Stage, Sequence[Path]],
    meta: BufferMeta,
    folder: Path | str,
    count: int,
    epochs_per_part: int = 10,
    report: Report | None = None,
) -> Imported:
    """Take the first ``count`` experts of replay buffers into the trajectory buffer ``folder``.

    ``files``: as ``find_files`` gives them; with one stage only, that stage (classifier experts then need the
    representation experts in the buffer). ``meta``: of the recipe whose experts they are to be; that they were trained on
    its data, whitened as it says, cannot be seen in the files. ``count``: ``experts.count`` of the recipe. Experts are
    numbered 0, 1, ... over the files in order, and the files of both stages must have them in the same order. Each part
    records the file's name and SHA-256 in its metadata (``versions``, ``imported_from``).

    All files are checked (checksums, kind, layout) before anything is written, and every expert as a whole (finite, moving,
    backbone frozen at the last representation checkpoint, bit for bit) before its first part. Run again after an
    interruption, it continues; rows that are there must be equal. Memory: ``epochs_per_part`` checkpoints; files are
    mapped, except for those in torch's format of before version 1.6, which are held whole, one at a time.

    Raises ``TrajectoryError``, naming the file, if one cannot be used, or the buffer holds experts that were trained here
    or other imported ones; ``StorageError`` if a part cannot be written.
    """
    say = report or (lambda line: None)
    if count < 1 or not any(files.values()):
        raise TrajectoryError("nothing to import; valid: at least one replay_buffer_N.pt and one expert")
    surveys = {stage: _survey(stage, files[stage], meta, count, say) for stage in STAGES if files.get(stage)}
    buffer = Buffer(folder, expected_hash=meta.experts_hash)
    _refuse_foreign(buffer, meta, list(surveys), count)
    intake = _Intake(buffer, meta, folder, epochs_per_part, claims.owner_id())
    for stage, (found, _) in surveys.items():  # first whatever the buffer has, so that a clash is found before any write
        there = set(buffer.experts(stage))
        for file in found:
            numbers = [e for e in range(file.first, file.first + file.count) if e in there]
            content = _load(file.path) if numbers else []
            for expert in numbers:
                intake.compare(stage, expert, content[expert - file.first], file)
    for stage, (found, _) in surveys.items():
        for file in found:
            content = _load(file.path)
            for expert in range(file.first, file.first + file.count):
                rows = intake.take(stage, expert, content[expert - file.first], file)
                say(f"{file.path}: {stage} expert {expert} ({expert + 1}/{count}), {rows} checkpoints written")
    return Imported(
        dict.fromkeys(surveys, count), intake.written, intake.present, {s: total - count for s, (_, total) in surveys.items()}
    )


def _survey(
    stage: Stage, paths: Sequence[Path], meta: BufferMeta, count: int, say: Report
) -> tuple[list[_File], int]:
    """The files that the first ``count`` experts lie in, checked, and how many experts all files together hold."""
    found, total = [], 0
    for path in paths:
        content = _load(path)
        if total < count:
            origin = f"{path.absolute().parent.name}/{path.name} sha256:{_checked_sum(path)}"
            taken = min(len(content), count - total)
            for i, expert in enumerate(content[:taken]):
                _check_expert(f"{path}: expert {i} of the file", stage, expert, meta)
            found.append(_File(path, origin, total, taken))
            say(f"{path}: {len(content)} {stage} experts, sound")
        total += len(content)
    if total < count:
        raise TrajectoryError(
            f"{paths[-1]}: is the last of {len(paths)} files with {total} {stage} experts together, and the recipe asks for "
            f"{count}; valid: more files, or --set experts.count={total}"
        )
    return found, total


def _refuse_foreign(buffer: Buffer, meta: BufferMeta, stages: Sequence[Stage], count: int) -> None:
    """Refuse a buffer of other data or another network, and one with experts of its own that no file will stand for."""
    changed = meta.differences(buffer.meta) if buffer.parts else []
    if changed:
        raise TrajectoryError(f"{buffer.folder}: holds trajectories of another {', '.join(changed)}; choose another run")
    for name in buffer.parts:
        if name.stage in stages and name.expert >= count and IMPORTED_FROM not in buffer.footer(name).meta.versions:
            raise TrajectoryError(
                f"{buffer.root}/{name}: expert {name.expert} was trained here, and imported experts are not mixed with such; "
                "import into a run or buffer folder of its own"
            )


class _Intake:
    """Puts checked experts into the buffer, one at a time, and counts checkpoints."""

    def __init__(self, buffer: Buffer, meta: BufferMeta, folder: Path | str, epochs_per_part: int, owner: str) -> None:
        self._buffer, self._meta, self._folder, self._per_part = buffer, meta, folder, epochs_per_part
        self._owner, self._mask, self._last = owner, _classifier_mask(meta), last_epochs(meta)
        self.written = self.present = 0

    def compare(self, stage: Stage, expert: int, checkpoints: Sequence[Sequence[Tensor]], file: _File) -> None:
        """Raise ``TrajectoryError`` if the buffer has another checkpoint than the file."""
        for epoch in self._buffer.epochs(stage, expert):
            path = f"{self._buffer.folder}: {stage} expert {expert} epoch {epoch}"
            if epoch > self._last[stage]:
                raise TrajectoryError(f"{path}: is past the recipe's last epoch {self._last[stage]}; choose another run")
            whole_P = _vector(checkpoints[epoch])
            row = whole_P if stage == "representation" else whole_P[self._mask]
            if self._buffer.read(stage, expert, epoch).tobytes() != row.tobytes():
                raise TrajectoryError(
                    f"{path}: differs from {file.path}, expert {expert - file.first} of the file: the buffer holds an expert "
                    "that was trained here, or imported from other files, and they are not mixed; import into a run or "
                    "buffer folder of its own"
                )
            self.present += 1

    def take(self, stage: Stage, expert: int, checkpoints: Sequence[Sequence[Tensor]], file: _File) -> int:
        """Write what the buffer lacks of one expert, after checking all of it; how many checkpoints that were."""
        first = self._buffer.last_contiguous_epoch(stage, expert)
        first = 0 if first is None else first + 1
        if first > self._last[stage]:
            return 0
        self._check_values(stage, expert, checkpoints, f"{file.path}: expert {expert - file.first} of the file")
        name = f"expert-{expert:04d}"
        meta = replace(self._meta, versions={**self._meta.versions, IMPORTED_FROM: file.origin})
        with claims.hold(self._folder, name, self._owner) as held:
            if not held:
                raise TrajectoryError(
                    f"{self._buffer.folder}: {name} is being trained or imported by another process; import into another "
                    "buffer folder, or again when that has ended"
                )
            with PartWriter(self._folder, meta, stage, expert, self._per_part) as writer:
                for epoch in range(first, self._last[stage] + 1):
                    whole_P = _vector(checkpoints[epoch])
                    writer.append(epoch, whole_P if stage == "representation" else whole_P[self._mask])
        self._buffer.refresh()
        rows = self._last[stage] + 1 - first
        self.written += rows
        return rows

    def _check_values(self, stage: Stage, expert: int, checkpoints: Sequence[Sequence[Tensor]], where: str) -> None:
        """Raise ``TrajectoryError`` for weights that are not finite, that never move, or whose backbone is not frozen."""
        frozen_P = None
        if stage == "classifier":
            frozen_P = self._buffer.read("representation", expert, self._last["representation"])[~self._mask]
        for epoch, tensors in enumerate(checkpoints):
            for tensor, (name, _) in zip(tensors, self._meta.parameters, strict=True):
                wrong = int((~tensor.detach().isfinite()).sum())
                if wrong:
                    raise TrajectoryError(f"{where}: epoch {epoch}: {wrong} values of {name} are NaN or infinite")
            if frozen_P is not None and _vector(tensors)[~self._mask].tobytes() != frozen_P.tobytes():
                raise TrajectoryError(
                    f"{where}: epoch {epoch}: its backbone is not that of representation expert {expert} at epoch "
                    f"{self._last['representation']}, and a classifier stage is stored with the backbone frozen there; valid: "
                    "second-stage files whose experts come in the order of the first stage's, trained with a frozen backbone"
                )
        if _vector(checkpoints[0]).tobytes() == _vector(checkpoints[-1]).tobytes():
            raise TrajectoryError(
                f"{where}: its first checkpoint equals its last, so it holds no trajectory; code that keeps `p.detach().cpu()` "
                "of a network on a CPU saves the last weights for all epochs: it must keep `p.detach().cpu().clone()`"
            )


# --- files and layout -----------------------------------------------------------------------------------------------


def last_epochs(meta: BufferMeta) -> dict[Stage, int]:
    """The last epoch of each stage, from the recipe in a buffer's metadata. Raises ``TrajectoryError``."""
    experts = meta.recipe.get("experts", {})
    try:
        return {stage: int(experts[field]) for stage, field in _LAST_EPOCH.items()}
    except (KeyError, TypeError, ValueError) as cause:
        raise TrajectoryError(f"trajectory metadata: recipe.experts: has no usable {cause}") from cause


def _load(path: Path) -> list[list[list[Tensor]]]:
    """The content of a replay buffer, as far as a list of lists goes; tensors of a current file are mapped, not read."""
    with _unreadable(path):
        mapped = zipfile.is_zipfile(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(content, list | tuple) or not content:
        raise TrajectoryError(f"{path}: is not a replay buffer: it holds {_kind(content)}; valid: {_FORM}")
    return list(content)


def _checked_sum(path: Path) -> str:
    """SHA-256 of the file, after the checksums inside it were found right; torch itself does not look at those."""
    with _unreadable(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
                    raise ValueError("its records are compressed, which torch.save does not do")
                wrong = archive.testzip()
            if wrong is not None:
                raise ValueError(f"its record {wrong} does not match its checksum")
        total = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                total.update(chunk)
        return total.hexdigest()


@contextmanager
def _unreadable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as cause:
        if cause.errno is None:
            raise _damaged(path, cause) from cause
        raise TrajectoryError(f"{path}: cannot be read: {cause.strerror}; valid: a readable file") from cause
    except Exception as cause:  # a damaged or foreign pickle may raise anything
        code = re.search(r"Unsupported (?:global|class|function)[^:]*: (?:GLOBAL )?([\w.]+)", str(cause))
        if code:
            raise TrajectoryError(
                f"{path}: was not loaded: it asks for {code[1]}, and a replay buffer needs nothing but tensors; do not load it "
                f"by other means unless you trust its origin; valid: {_FORM}"
            ) from cause
        raise _damaged(path, cause) from cause


def _damaged(path: Path, cause: Exception) -> TrajectoryError:
    reason = (str(cause).splitlines() or [repr(cause)])[0].removesuffix(".")
    if "Weights only load failed" in reason:  # torch's advice here is to load without protection
        reason = "its pickle cannot be understood"
    return TrajectoryError(f"{path}: is damaged, or not a file of torch.save: {reason}; valid: {_FORM}")


def _check_expert(where: str, stage: Stage, expert: Any, meta: BufferMeta) -> None:
    """Hold the kinds, numbers and shapes of one expert against the recipe, without reading weights."""
    last = last_epochs(meta)[stage]
    if not isinstance(expert, list | tuple):
        raise TrajectoryError(f"{where}: is {_kind(expert)}; valid: {_FORM}")
    if len(expert) != last + 1:
        raise TrajectoryError(
            f"{where}: has {len(expert)} checkpoints where the recipe's {stage} stage has {last + 1}, the initialisation and "
            f"{last} epochs; valid: --set experts.{_LAST_EPOCH[stage]}={max(len(expert) - 1, 1)}, or other files"
        )
    for epoch, tensors in enumerate(expert):
        _check_checkpoint(f"{where}: epoch {epoch}", tensors, meta)


def _check_checkpoint(where: str, tensors: Any, meta: BufferMeta) -> None:
    if not isinstance(tensors, list | tuple) or not all(isinstance(t, Tensor) for t in tensors):
        raise TrajectoryError(f"{where}: is {_kind(tensors)}; valid: {_FORM}")
    if len(tensors) != len(meta.parameters):
        raise TrajectoryError(
            f"{where}: has {len(tensors)} tensors where the recipe's network has {len(meta.parameters)} parameters "
            f"({meta.parameters[0][0]} to {meta.parameters[-1][0]}); valid: whole networks of the recipe's model.depth"
        )
    wrong = [
        f"{name} is {_shape(shape)} there, {_shape(tensor.shape)} here"
        for tensor, (name, shape) in zip(tensors, meta.parameters, strict=True)
        if tuple(tensor.shape) != shape
    ]
    if wrong:
        raise TrajectoryError(f"{where}: is not the recipe's network: {'; '.join(wrong[:4])}; compare model.width and data")
    for tensor, (name, _) in zip(tensors, meta.parameters, strict=True):
        if tensor.dtype != torch.float32 or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise TrajectoryError(f"{where}: {name} is {_kind(tensor)}; valid: dense torch.float32")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.layout).removeprefix('torch.')} tensor of {value.dtype} on {value.device}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}" + (f" ({type(value[0]).__name__}, ...)" if value else "")
    return f"a {type(value).__name__}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _listed(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:10])) + (", ..." if len(values) > 10 else "") if values else "none"


def _vector(tensors: Sequence[Tensor]) -> Vector:
    """All weights of one checkpoint, shape (P,), in module order."""
    vector: Vector = torch.cat([t.detach().reshape(-1) for t in tensors]).numpy()
    return vector


def _tensors(meta: BufferMeta, whole_P: Vector) -> list[Tensor]:
    """The parameters as tensors of their own storage each, which share the memory of ``whole_P``."""
    result, begin = [], 0
    for _, shape in meta.parameters:
        end = begin + math.prod(shape)
        result.append(torch.from_numpy(whole_P[begin:end].reshape(shape)))
        begin = end
    return result


def _classifier_mask(meta: BufferMeta) -> npt.NDArray[np.bool_]:
    """(P,): which weights are the classifier's."""
    chosen = set(meta.classifier_parameters)
    pieces = [np.full(math.prod(shape), name in chosen) for name, shape in meta.parameters]
    return np.concatenate(pieces)
