import errno

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lad_dist.errors import TrajectoryError
from lad_dist.seeds import rng
from lad_dist.trajectories import Buffer, Checkpoint, files, part
from lad_dist.trajectories.schema import part_path

PART = part_path("representation", 7, 0, 3)


def about(file, problems):
    """All problems, after checking that there are some and that each begins with the file's path."""
    assert problems and all(problem.startswith(f"{file}: ") for problem in problems), problems
    return "\n".join(problems)


def test_every_flipped_byte_is_reported(write, weights):
    """At 400 random places and at every place near the ends, where headers and footer are."""
    file = write(3) / PART
    good = file.read_bytes()
    draws = rng(0, "flips")
    places = {*range(60), *range(len(good) - 120, len(good)), *draws.integers(0, len(good), 400).tolist()}
    for place in sorted(places):
        bad = bytearray(good)
        bad[place] ^= 1 << int(draws.integers(8))
        file.write_bytes(bad)
        buffer = Buffer(file.parents[2])
        about(file, buffer.verify())
        for epoch in range(4):  # a plain read either fails cleanly or returns the right weights
            try:
                found = buffer.read("representation", 7, epoch)
            except TrajectoryError as error:
                assert str(file) in str(error)
            else:
                assert np.array_equal(found, weights("representation", 7, epoch))
    file.write_bytes(good)
    assert Buffer(file.parents[2]).verify() == []


def test_a_part_cut_at_any_length_is_reported(write):
    file = write(3) / PART
    good = file.read_bytes()
    for length in {*range(0, len(good), 97), *range(16), *range(len(good) - 16, len(good))}:
        file.write_bytes(good[:length])
        assert "damaged" in about(file, Buffer(file.parents[2]).verify())
    with pytest.raises(
        TrajectoryError, match=r"epochs-0000-0003.parquet: .* delete it and run `lad-dist experts` again"
    ):
        Buffer(file.parents[2]).read("representation", 7, 0)


def test_bytes_added_at_the_end_are_reported(write):
    file = write(3) / PART
    file.write_bytes(file.read_bytes() + b"PAR1")
    about(file, Buffer(file.parents[2]).verify())


def test_a_part_under_another_name_is_reported(write):
    folder = write(3)
    for name in (
        part_path("representation", 8, 0, 3),
        part_path("representation", 7, 1, 4),
        part_path("classifier", 7, 0, 3),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((folder / PART).read_bytes())
        problems = Buffer(folder).verify()
        assert "renamed" in about(folder / name, [p for p in problems if str(folder / name) in p])
        (folder / name).unlink()
    (folder / part_path("representation", 7, 0, 4)).write_bytes((folder / PART).read_bytes())
    with pytest.raises(TrajectoryError, match="4 rows in 4 row groups where its name says 5"):
        Buffer(folder).read("representation", 7, 4)


def test_foreign_files_are_ignored_and_foreign_parquet_is_mentioned(write):
    folder = write(3)
    foreign = folder / "representation" / "expert-0007" / "copy of epochs-0000-0003.parquet"
    foreign.write_bytes((folder / PART).read_bytes())
    (folder / "README.txt").write_text("mine")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.parquet").write_bytes(b"")
    (folder / PART).with_name(".epochs-0004-0007.parquet.host.1.ab.tmp").write_bytes(b"PAR1")
    buffer = Buffer(folder)
    assert buffer.epochs("representation", 7) == (0, 1, 2, 3)
    assert "is not the name of a part" in about(foreign, buffer.verify())


def test_gaps_are_reported_with_the_expert(write):
    folder = write(9, per_part=2)
    (folder / part_path("representation", 7, 4, 5)).unlink()
    lines: list[str] = []
    problems = Buffer(folder).verify(lines.append)
    text = about(folder / "representation/expert-0007", problems)
    assert "2 epochs before epoch 9 are missing (4, 5)" in text
    assert len(lines) == 4 + 1 and "2 checkpoints are intact" in lines[0] and lines[-1] == problems[0]


def forged(folder, meta, rows, name):
    """A part with valid checksums whatever it holds, as a wrong or hostile program could make."""
    file = folder / name
    filesystem, path = files.local(file)
    files.publish(filesystem, path, lambda sink: part.write_part(sink, meta, rows))
    return file


def test_duplicates_that_differ_are_reported(write, meta, weights):
    folder = write(3)
    rows = [Checkpoint("representation", 7, 3, weights("representation", 7, 3) + 1, 1 / 3, 0.75, 1.5)]
    file = forged(folder, meta, rows, part_path("representation", 7, 3, 3))
    assert f"epoch 3: differs from the same checkpoint in {folder / PART}" in about(file, Buffer(folder).verify())


def test_values_that_are_not_finite_are_reported(tmp_path, meta, weights):
    bad = weights("representation", 7, 0)
    bad[5] = np.nan
    rows = [Checkpoint("representation", 7, 0, bad, float("inf"))]
    file = forged(tmp_path, meta, rows, part_path("representation", 7, 0, 0))
    text = about(file, Buffer(tmp_path).verify())
    assert "1 weights are NaN or infinite" in text and "loss is inf" in text


@pytest.mark.parametrize("length", [0, 222, 224, 1_000_000])
def test_vectors_of_another_length_are_refused_before_they_are_read(tmp_path, meta, length):
    """The last one would take 4 MB where the layout promises 892 bytes."""
    rows = [Checkpoint("representation", 7, 0, np.zeros(length, np.float32))]
    file = forged(tmp_path, meta, rows, part_path("representation", 7, 0, 0))
    assert "impossible sizes" in about(file, Buffer(tmp_path).verify())
    with pytest.raises(TrajectoryError, match="impossible sizes"):
        Buffer(tmp_path).read("representation", 7, 0)


def test_a_footer_that_claims_too_much_is_refused(write):
    file = write(3) / PART
    for claim in (2**31 - 1, 2**32 - 1, file.stat().st_size, 0):
        good = file.read_bytes()
        file.write_bytes(good[:-8] + claim.to_bytes(4, "little") + good[-4:])
        assert "its footer claims" in about(file, Buffer(file.parents[2]).verify())
        file.write_bytes(good)


def test_a_parquet_file_of_another_program_is_refused(write, meta):
    folder = write(3)
    file = folder / part_path("representation", 7, 4, 4)
    pq.write_table(pa.table({"weights": [[1.0]], "epoch": [4]}), file)
    assert "did not write it" in about(file, Buffer(folder).verify())
    table = pq.read_table(folder / PART)
    pq.write_table(table, folder / PART)  # rewritten by hand: metadata copied, checksums stale or gone
    with pytest.raises(TrajectoryError, match="damaged"):
        Buffer(folder).read("representation", 7, 0)


def test_a_folder_or_file_that_cannot_be_read_is_named(write, monkeypatch):
    folder = write(3)

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files, "open_for_reading", refuse)
    with pytest.raises(TrajectoryError, match=r"epochs-0000-0003.parquet: cannot be read: Permission denied"):
        Buffer(folder).read("representation", 7, 0)
    with pytest.raises(TrajectoryError, match="cannot be listed"):
        Buffer(folder / PART)


def test_damage_in_the_first_part_is_named_by_meta(write):
    file = write(3) / PART
    write(3, expert=8)
    file.write_bytes(b"")
    with pytest.raises(TrajectoryError, match=r"expert-0007.*0 bytes long"):
        Buffer(file.parents[2]).meta  # noqa: B018


def test_a_folder_under_a_part_s_name_is_refused(write):
    root = write(last=7)
    file = sorted(root.rglob("*.parquet"))[-1]
    file.unlink()
    file.mkdir()
    with pytest.raises(TrajectoryError, match=rf"{file.name}: is a folder where a trajectory part is valid"):
        Buffer(root).verify()
