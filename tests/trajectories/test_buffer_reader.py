import hashlib
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest

from lad_dist.errors import TrajectoryError
from lad_dist.trajectories import Buffer, PartWriter, part, reader
from lad_dist.trajectories.schema import part_path


def test_what_was_written_is_read(write, weights, meta):
    folder = write(9)
    write(3, stage="classifier")
    buffer = Buffer(folder)
    assert buffer.meta == meta
    assert buffer.experts("representation") == buffer.experts("classifier") == (7,)
    assert buffer.epochs("representation", 7) == tuple(range(10))
    for stage, epochs in (("representation", 10), ("classifier", 4)):
        for epoch in range(epochs):
            found = buffer.read(stage, 7, epoch)
            assert found.dtype == np.float32 and found.flags.writeable
            assert np.array_equal(found, weights(stage, 7, epoch))


def test_metrics_are_read_with_the_checkpoint(write, weights):
    buffer = Buffer(write(2))
    start, later = buffer.read_checkpoint("representation", 7, 0), buffer.read_checkpoint("representation", 7, 2)
    assert (start.loss, start.accuracy, start.seconds) == (None, None, None)
    assert (later.stage, later.expert, later.epoch) == ("representation", 7, 2)
    assert (later.loss, later.accuracy, later.seconds) == (0.5, 1 - 1 / 3, 1.0)
    assert np.array_equal(later.weights, weights("representation", 7, 2))


def test_any_parquet_reader_sees_lists_of_floats(write, weights, meta):
    file = write(3) / part_path("representation", 7, 0, 3)
    table = pq.read_table(file)
    assert table["weights"].to_pylist() == [weights("representation", 7, epoch).tolist() for epoch in range(4)]
    assert table["epoch"].to_pylist() == [0, 1, 2, 3] and set(table["stage"].to_pylist()) == {"representation"}
    assert table["loss"].to_pylist()[:2] == [None, 1.0]
    assert json.loads(pq.read_schema(file).metadata[b"lad_dist"])["experts_hash"] == meta.experts_hash
    assert pq.read_table(file, filters=[("epoch", "==", 2)]).num_rows == 1


def test_a_read_touches_only_its_own_row(write, weights):
    file = write(3) / part_path("representation", 7, 0, 3)
    column = pq.read_metadata(file).row_group(1).column(3)
    data = bytearray(file.read_bytes())
    middle = column.data_page_offset + column.total_compressed_size // 2
    data[middle] ^= 1
    file.write_bytes(data)
    buffer = Buffer(file.parents[2])
    for epoch in (0, 2, 3):
        assert np.array_equal(buffer.read("representation", 7, epoch), weights("representation", 7, epoch))
    with pytest.raises(TrajectoryError, match="damaged"):
        buffer.read("representation", 7, 1)


def test_the_resume_point_is_the_last_epoch_without_a_gap_before_it(write):
    folder = write(9, per_part=2)
    buffer = Buffer(folder)
    assert buffer.last_contiguous_epoch("representation", 7) == 9
    (folder / part_path("representation", 7, 4, 5)).unlink()
    assert buffer.refresh() == 0
    assert buffer.last_contiguous_epoch("representation", 7) == 3
    assert buffer.has("representation", 7, 6) and not buffer.has("representation", 7, 4)
    (folder / part_path("representation", 7, 0, 1)).unlink()
    buffer.refresh()
    assert buffer.last_contiguous_epoch("representation", 7) is None
    assert buffer.last_contiguous_epoch("classifier", 7) is None


def test_refresh_counts_new_parts(write):
    folder = write(3)
    buffer = Buffer(folder)
    assert buffer.refresh() == 0
    write(7, first=4, per_part=2)
    write(0, expert=9)
    assert not buffer.has("representation", 9, 0)
    assert buffer.refresh() == 3
    assert buffer.experts("representation") == (7, 9)


def test_an_empty_buffer_says_how_to_fill_it(tmp_path):
    buffer = Buffer(tmp_path / "nowhere")
    assert buffer.experts("classifier") == () and buffer.last_contiguous_epoch("classifier", 0) is None
    with pytest.raises(TrajectoryError, match=r"nowhere: holds no trajectory parts; make them with `lad-dist experts"):
        buffer.meta  # noqa: B018
    assert buffer.verify() == []


def test_a_missing_checkpoint_is_named(write):
    buffer = Buffer(write(3))
    with pytest.raises(TrajectoryError, match=r"buffer: representation expert 7 epoch 4 is missing; .* epochs 0 to 3"):
        buffer.read("representation", 7, 4)
    with pytest.raises(TrajectoryError, match=r"representation expert 8 epoch 0 is missing; .* experts 7 to 7"):
        buffer.read("representation", 8, 0)
    with pytest.raises(TrajectoryError, match=r"classifier expert 7 epoch 0 is missing; .* experts none"):
        buffer.read_checkpoint("classifier", 7, 0)


def test_a_part_deleted_after_listing_is_named(write):
    folder = write(3)
    buffer = Buffer(folder)
    shutil.rmtree(folder / "representation")
    with pytest.raises(TrajectoryError, match=r"epochs-0000-0003.parquet: the part was removed"):
        buffer.read("representation", 7, 0)


def test_parts_of_another_recipe_are_refused(write, meta):
    folder = write(3)
    write(3, expert=8, meta=replace(meta, experts_hash="bb22"))
    buffer = Buffer(folder)
    buffer.read("representation", 7, 0)
    with pytest.raises(TrajectoryError, match=r"expert-0008.*made by another recipe: .*bb22.*aa11 is in .*expert-0007"):
        buffer.read("representation", 8, 0)
    with pytest.raises(TrajectoryError, match=r"expert-0007.*made by another recipe: .*aa11, and bb22 is expected"):
        Buffer(folder, expected_hash="bb22").read("representation", 7, 0)
    assert [problem for problem in buffer.verify() if "another recipe" in problem and "expert-0008" in problem]


def test_a_part_replaced_by_one_of_another_recipe_is_refused(write, meta):
    folder = write(3)
    buffer = Buffer(folder)
    buffer.read("representation", 7, 0)
    write(3, meta=replace(meta, experts_hash="bb22"))
    with pytest.raises(TrajectoryError, match="made by another recipe"):
        buffer.read("representation", 7, 0)


def test_one_hash_with_two_meanings_is_refused(write, meta):
    folder = write(3)
    write(3, expert=8, meta=replace(meta, class_counts=(50, 20, 6)))
    with pytest.raises(TrajectoryError, match=r"expert-0008.* but another class_counts"):
        buffer = Buffer(folder)
        buffer.read("representation", 7, 0)
        buffer.read("representation", 8, 0)


def test_library_versions_may_differ(write, meta):
    folder = write(3)
    write(3, expert=8, meta=replace(meta, versions={"torch": "3.0"}))
    assert Buffer(folder).verify() == []


def test_the_digest_depends_on_the_checkpoints_only(write, tmp_path):
    cut = [write(11, per_part=n, folder=tmp_path / f"by-{n}") for n in (1, 5, 12)]
    write(8, first=2, per_part=4, folder=cut[1])  # overlapping parts
    digests = {Buffer(folder).digest() for folder in cut}
    assert len(digests) == 1
    shorter = write(10, folder=tmp_path / "shorter")
    other = write(11, expert=8, folder=tmp_path / "other")
    assert len(digests | {Buffer(shorter).digest(), Buffer(other).digest()}) == 3


def test_the_digest_is_made_of_sums_in_the_footers_and_reads_no_weights(write, weights, monkeypatch):
    folder = write(5)
    write(2, stage="classifier", expert=11)
    expected = hashlib.sha256()
    for stage, expert, last in (("representation", 7, 5), ("classifier", 11, 2)):
        for epoch in range(last + 1):
            expected.update(f"{stage}/{expert}/{epoch}\n".encode())
            expected.update(hashlib.sha256(weights(stage, expert, epoch).astype("<f4").tobytes()).digest())
    monkeypatch.setattr(part, "read_row", None)
    told: list[int] = []
    assert Buffer(folder).digest(told.append) == expected.hexdigest() and sum(told) == 3


def test_parts_of_an_earlier_version_without_row_sums_have_the_same_digest(write, tmp_path, monkeypatch):
    new = write(9, folder=tmp_path / "new")
    with monkeypatch.context() as earlier:
        earlier.setattr(part, "_ROW_SUMS", b"something_else")
        old = write(9, folder=tmp_path / "old")
    write(11, first=8, per_part=4, folder=old)  # continued by this version
    write(11, first=10, folder=new)
    assert Buffer(old).digest() == Buffer(new).digest() and Buffer(old).verify() == []


def test_a_renamed_part_has_no_digest(write):
    folder = write(3)
    path = folder / "representation/expert-0007/epochs-0000-0003.parquet"
    path.rename(path.with_name("epochs-0001-0004.parquet"))
    with pytest.raises(TrajectoryError, match=r"epochs-0001-0004.parquet: .*was it renamed\?"):
        Buffer(folder).digest()


def test_a_row_sum_that_is_not_the_rows_is_found(write, monkeypatch):
    with monkeypatch.context() as wrong:
        wrong.setattr(part, "weights_sum", lambda weights: bytes(32))
        folder = write(1)
    problems = Buffer(folder).verify()
    assert len(problems) == 2 and all("do not match their checksum" in problem for problem in problems)


def test_a_thousand_experts_are_inspected_within_seconds_and_without_their_weights(meta, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)  # of the test's own writing
    for expert in range(1000):
        with PartWriter(tmp_path, meta, "representation", expert) as writer:
            writer.append(0, np.full(meta.vector_length("representation"), expert, np.float32))
    monkeypatch.setattr(part, "read_row", None)
    began, told = time.process_time(), []
    found = Buffer(tmp_path).inspect(report=told.append)
    assert time.process_time() - began < 1.0  # 0.3 s; 13 parts an expert are as many times more
    assert found["checkpoints"] == sum(told) == 1000 and len(told) > 2 and len(found["digest"]) == 64


def test_overlapping_parts_hold_the_same_checkpoints(write, weights):
    folder = write(7, per_part=4)
    write(5, first=2, per_part=3)
    buffer = Buffer(folder)
    assert buffer.epochs("representation", 7) == tuple(range(8))
    for epoch in range(8):
        assert np.array_equal(buffer.read("representation", 7, epoch), weights("representation", 7, epoch))
    assert buffer.verify() == []
    found = buffer.inspect()
    assert (found["parts"], found["rows"], found["checkpoints"]) == (4, 12, 8)


def test_inspect_is_plain_and_complete(write, meta):
    folder = write(5)
    write(1, stage="classifier", expert=3)
    buffer = Buffer(folder)
    found = buffer.inspect()
    assert json.loads(json.dumps(found)) == found
    assert found["stages"]["representation"]["7"]["epochs"] == [0, 1, 2, 3, 4, 5]
    assert found["stages"]["classifier"]["3"]["parts"] == ["classifier/expert-0003/epochs-0000-0001.parquet"]
    assert found["bytes"] == sum(file.stat().st_size for file in folder.rglob("*.parquet"))
    assert found["digest"] == buffer.digest() and "digest" not in buffer.inspect(digest=False)
    assert found["meta"]["vector_lengths"] == {"representation": 223, "classifier": 63}


def test_threads_may_share_a_buffer(write, weights, monkeypatch):
    monkeypatch.setattr(reader, "KEPT_FOOTERS", 2)  # footers come and go
    buffer = Buffer(write(11, per_part=2))
    with ThreadPoolExecutor(4) as pool:
        epochs = [epoch for epoch in range(12) for _ in range(20)]
        for epoch, found in zip(epochs, pool.map(lambda e: buffer.read("representation", 7, e), epochs), strict=True):
            assert np.array_equal(found, weights("representation", 7, epoch))
    assert len(buffer._footers) == 2


def test_a_part_replaced_after_its_footer_was_read_is_read_anew(write, weights, meta):
    folder = write(3)
    buffer = Buffer(folder)
    buffer.read("representation", 7, 0)
    with PartWriter(
        folder, replace(meta, versions={"torch": "3.0", "a longer": "footer"}), "representation", 7, 4
    ) as writer:
        for epoch in range(4):
            writer.append(epoch, weights("representation", 7, epoch) * 2)
    assert np.array_equal(buffer.read("representation", 7, 3), weights("representation", 7, 3) * 2)


def test_a_part_replaced_during_a_read_is_read_again(write, weights, monkeypatch):
    folder = write(3)
    buffer = Buffer(folder)
    original, calls = part.read_row, []

    def overtaken(*arguments):
        calls.append(1)
        if len(calls) == 1:  # the footer is stale before its row is read
            write(3)
            raise part.damaged("stale", "offsets of the old file")
        return original(*arguments)

    monkeypatch.setattr(part, "read_row", overtaken)
    assert np.array_equal(buffer.read("representation", 7, 3), weights("representation", 7, 3))
    assert len(calls) == 2
