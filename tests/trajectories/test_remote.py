"""Buffers in an object store: an S3 server (moto) on the loopback address, written, read, interrupted and unreachable."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import fs

from lad_dist.errors import StorageError, TrajectoryError
from lad_dist.location import has_credentials, is_remote, joined, shown
from lad_dist.trajectories import Buffer, PartWriter, claims, files
from lad_dist.trajectories.schema import expert_folder, part_path

ROOT = Path(__file__).resolve().parents[2]
PART = part_path("representation", 7, 0, 3)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server with the bucket ``bucket``."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        reason = "moto[server] is not installed: no S3 server to test against"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while True:
            assert process.poll() is None and time.monotonic() < deadline, "the S3 server did not start"
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                time.sleep(0.05)
        owner = fs.S3FileSystem(access_key="key", secret_key="secret", endpoint_override=f"127.0.0.1:{port}", scheme="http",
                                region="us-east-1", allow_bucket_creation=True)  # fmt: skip
        owner.create_dir("bucket")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def uri(server, request) -> str:
    """A location of its own for each test."""
    return at(server, f"bucket/{abs(hash(request.node.nodeid))}")


def at(server: str, path: str) -> str:
    return f"s3://{path}?endpoint_override={server}&scheme=http"


def objects(uri: str) -> list[str]:
    filesystem, root = files.resolve(uri)
    return [entry.path for entry in files.list_files(filesystem, root)]


class Wrapped:
    """A file system with some methods replaced; Arrow's own classes cannot be patched."""

    def __init__(self, inner: fs.FileSystem, **replaced: Callable[..., Any]) -> None:
        self._inner, self._replaced = inner, replaced

    def __getattr__(self, name: str) -> Any:
        return self._replaced.get(name) or getattr(self._inner, name)


class HalfWritten:
    """An output stream that does something when half of the bytes are written."""

    def __init__(self, stream: Any, between: Callable[[], None]) -> None:
        self._stream, self._between = stream, between

    def __enter__(self) -> HalfWritten:
        return self

    def __exit__(self, *raised: Any) -> None:
        self._stream.__exit__(*raised)

    def write(self, content: bytes) -> None:
        half = len(content) // 2
        self._stream.write(content[:half])
        self._between()
        self._stream.write(content[half:])


def wrapped_writer(uri: str, meta, weights, **replaced: Callable[..., Any]) -> PartWriter:
    """A writer with the epochs 0 to 3 of expert 7 pending."""
    writer = PartWriter(uri, meta, "representation", 7)
    for epoch in range(4):
        writer.append(epoch, weights("representation", 7, epoch))
    writer._filesystem = Wrapped(writer._filesystem, **replaced)  # type: ignore[assignment]
    return writer


# --- locations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("location", "expected"), [
    ("s3://bucket/a", "s3://bucket/a"),
    ("s3://bucket/a?scheme=http&region=x", "s3://bucket/a?scheme=http&region=x"),
    ("s3://KEY:SECRET@bucket/a?scheme=http", "s3://bucket/a?scheme=http"),
    ("s3://KEY:SEC/RET@bucket/a", "s3://bucket/a"),
    ("s3://KEY@bucket/a", "s3://bucket/a"),
    ("s3://bucket/me@work/a?scheme=http", "s3://bucket/me@work/a?scheme=http"),
    ("s3://bucket/a?scheme=http&session_token=SECRET", "s3://bucket/a"),
    ("gs://anonymous@bucket/a", "gs://anonymous@bucket/a"),
    ("/a/b@c", "/a/b@c"),
    (Path("/a/b"), "/a/b"),
])  # fmt: skip
def test_locations_are_shown_without_credentials(location, expected):
    assert shown(location) == expected
    assert has_credentials(location) == (shown(location) != str(location))


def test_joining_keeps_the_query():
    assert joined("s3://bucket/a/?scheme=http", "b") == "s3://bucket/a/b?scheme=http"
    assert joined("s3://bucket", "b") == "s3://bucket/b"
    assert joined("a", "b") == joined(Path("a"), "b") == Path("a/b")


def test_local_locations(tmp_path, write):
    folder = write(3)
    digest = Buffer(folder).digest()
    assert Buffer(str(folder)).digest() == Buffer(f"file://{folder}").digest() == digest
    assert not is_remote(f"file://{folder}") and not is_remote(str(folder)) and is_remote("s3://b")
    with pytest.raises(TrajectoryError, match="valid: file:///absolute/folder"):
        files.resolve("file://host/folder")


@pytest.mark.parametrize(("location", "message"), [
    ("s4://bucket/a", "the kind of storage is unknown; valid: a folder, s3://bucket/prefix"),
    ("s3://", "names no bucket"),
    ("s3://KEY:SECRET@/a", "names no bucket"),
    ("s3://bucket/a?endpoint=x&region=y", "query fields endpoint are unknown, known are region, scheme"),
    ("s3://KEY:SECRET@bucket/a?scheme=ftp&region=y", "Invalid S3 connection scheme"),
    ("s3://KEY:@bucket/a?region=y", "access_key and secret_key must be provided"),
    ("gs://KEY:SECRET@bucket/a?foo=x", "cannot be opened"),
])  # fmt: skip
def test_locations_that_cannot_be_opened(location, message):
    with pytest.raises(TrajectoryError, match=message) as caught:
        Buffer(location)
    chain, error = [], caught.value
    while error is not None:
        chain.append(str(error))
        error = error.__cause__
    assert "SECRET" not in "".join(chain)


# --- reading and writing ----------------------------------------------------------------------------------------------


def test_what_is_written_is_read(uri, write, weights):
    local = Buffer(write(9))
    write(9, folder=uri)
    write(2, folder=uri, stage="classifier", expert=3)
    buffer = Buffer(uri)
    assert buffer.epochs("representation", 7) == tuple(range(10))
    assert np.array_equal(buffer.read("representation", 7, 5), weights("representation", 7, 5))
    assert buffer.read_checkpoint("representation", 7, 5).loss == 1 / 5
    assert buffer.verify() == []
    found = buffer.inspect()
    assert (found["folder"], found["parts"], found["checkpoints"]) == (uri, 4, 13)
    assert all(name.endswith(".parquet") for name in objects(uri))
    write(2, stage="classifier", expert=3)
    local.refresh()
    assert found["digest"] == local.digest()


def test_credentials_in_the_uri_work_and_are_not_shown(server, request, write):
    secret = at(server, f"KEY:SECRET@bucket/{request.node.name}")
    write(3, folder=secret)
    buffer = Buffer(secret)
    assert buffer.verify() == []
    with pytest.raises(TrajectoryError) as caught:
        buffer.read("representation", 7, 99)
    assert "SECRET" not in f"{caught.value} {buffer.inspect()}" and f"bucket/{request.node.name}" in str(caught.value)


def test_experts_trained_straight_to_the_store_and_resumed(uri, tmp_path, small_recipe):
    import torch

    from lad_dist.data.prepare import prepare
    from lad_dist.experts.train import ExpertTrainer

    recipe = small_recipe()
    data = prepare(recipe, tmp_path / "whitening.safetensors", torch.device("cpu"))
    local, remote = (ExpertTrainer(recipe, data, where) for where in (tmp_path / "local", uri))
    for expert in range(recipe.experts.count):
        list(local.train(expert))
    with closing(remote.train(0)) as epochs:
        for epoch in epochs:
            if (epoch.stage, epoch.epoch) == ("representation", 3):
                break  # stopped: what is pending is published
    assert sum(remote.left(range(2)).values()) == 14 - 3
    for expert in (0, 1):
        list(remote.train(expert))
    assert set(remote.left(range(2)).values()) == {0}
    assert Buffer(uri).verify() == []
    assert Buffer(uri).digest() == Buffer(tmp_path / "local").digest()


# --- publishing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_upload_that_is_interrupted_leaves_nothing(uri, meta, weights, error):
    """Arrow's streams finish the upload when they are closed by an error, or dropped."""

    def stop() -> None:
        raise error("stop")

    def breaking(path: str) -> HalfWritten:
        return HalfWritten(writer._filesystem._inner.open_output_stream(path), stop)

    writer = wrapped_writer(uri, meta, weights, open_output_stream=breaking)
    with pytest.raises(error):
        writer.flush()
    assert objects(uri) == []
    writer._filesystem = writer._filesystem._inner
    assert writer.flush() and objects(uri) == [PART] and Buffer(uri).verify() == []


CHILD = """
import os, signal, sys
import numpy as np
from lad_dist.trajectories import BufferMeta, PartWriter, files
sys.path.insert(0, sys.argv[3])
from test_remote import HalfWritten, Wrapped

size = 3_000_000  # more than Arrow collects before it sends
meta = BufferMeta("aa11", "ff00", (1,), (("w", (size,)),), ("w",))
writer = PartWriter(sys.argv[1], meta, "representation", 1)
for epoch in range(3):
    writer.append(epoch, np.random.default_rng(epoch).normal(size=size).astype(np.float32))
inner = writer._filesystem
if sys.argv[2] == "upload":
    killing = lambda path: HalfWritten(inner.open_output_stream(path), lambda: os.kill(os.getpid(), signal.SIGKILL))
    writer._filesystem = Wrapped(inner, open_output_stream=killing)
else:
    writer._filesystem = Wrapped(inner, copy_file=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
writer.flush()
"""


@pytest.mark.parametrize("during", ["upload", "copy"])
def test_a_writer_killed_while_publishing_leaves_nothing_visible(uri, during):
    command = [sys.executable, "-c", CHILD, uri, during, str(Path(__file__).parent)]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    buffer = Buffer(uri)
    assert buffer.parts == () and buffer.verify() == []
    left = objects(uri)  # before the copy, the whole upload under its hidden name
    assert [Path(name).name[0] for name in left] == ["."] * (during == "copy")
    filesystem, root = files.resolve(uri)
    folder = f"{root}/{expert_folder('representation', 1)}"
    assert len(files.clean_temporary_files(filesystem, folder)) == len(left)  # its process is dead
    assert objects(uri) == []


def test_a_reader_sees_nothing_or_the_whole_part(uri, meta, weights):
    seen, half, go_on = [], threading.Event(), threading.Event()

    def wait() -> None:
        half.set()
        assert go_on.wait(30)

    def slow(path: str) -> HalfWritten:
        return HalfWritten(writer._filesystem._inner.open_output_stream(path), wait)

    writer = wrapped_writer(uri, meta, weights, open_output_stream=slow)
    thread = threading.Thread(target=writer.flush)
    thread.start()
    assert half.wait(30)
    buffer = Buffer(uri)
    seen.append(len(buffer.parts))
    go_on.set()
    while not buffer.parts and thread.is_alive():
        buffer.refresh()
    thread.join()
    buffer.refresh()
    assert seen == [0] and [str(name) for name in buffer.parts] == [PART]
    assert buffer.verify() == []


def test_errors_that_pass_are_waited_out(uri, meta, weights, monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    calls = []

    def flaky(source: str, target: str) -> None:
        calls.append(source)
        if len(calls) < 3:
            raise OSError("When copying: AWS Error SLOW_DOWN during CopyObject operation: please reduce your rate")
        writer._filesystem._inner.copy_file(source, target)

    writer = wrapped_writer(uri, meta, weights, copy_file=flaky)
    assert writer.flush()
    assert len(calls) == 3 and len(set(calls)) == 1 and objects(uri) == [PART]


@pytest.mark.parametrize(("reason", "attempts"), [("ACCESS_DENIED", 1), ("SLOW_DOWN", 4)])
def test_errors_that_last_are_reported(uri, meta, weights, monkeypatch, reason, attempts):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    calls = []

    def refuse(source: str, target: str) -> None:
        calls.append(source)
        raise OSError(f"When copying: AWS Error {reason} during CopyObject operation: no")

    writer = wrapped_writer(uri, meta, weights, copy_file=refuse)
    with pytest.raises(StorageError) as caught:
        writer.flush()
    assert str(caught.value).startswith(f"s3://{files.resolve(uri)[1]}/{PART}: could not be published: ")
    assert reason in str(caught.value) and "accepts your writes" in str(caught.value)
    assert len(calls) == attempts and objects(uri) == []


def test_an_upload_that_arrives_short_is_not_published(uri, meta, weights, monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)

    def losing(path: str) -> Any:
        class Losing(HalfWritten):
            def write(self, content: bytes) -> None:
                self._stream.write(content[:-1])

        return Losing(writer._filesystem._inner.open_output_stream(path), lambda: None)

    writer = wrapped_writer(uri, meta, weights, open_output_stream=losing)
    with pytest.raises(StorageError, match="incomplete upload"):
        writer.flush()
    assert objects(uri) == []


# --- stores that refuse -----------------------------------------------------------------------------------------------


def test_a_bucket_that_does_not_exist(server, meta):
    for use in (Buffer, lambda where: PartWriter(where, meta, "representation", 7)):
        with pytest.raises(TrajectoryError, match=r"^s3://nowhere/a\S*: bucket nowhere does not exist; create it"):
            use(at(server, "nowhere/a"))


def answering(reply: bytes | None) -> tuple[socket.socket, str]:
    """A server that says ``reply`` to everyone, or nothing at all."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connections = []
        while True:
            try:
                connection = listening.accept()[0]
            except OSError:
                return
            connections.append(connection)
            if reply is not None:
                connection.recv(65536)
                connection.sendall(reply)
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    return listening, f"127.0.0.1:{listening.getsockname()[1]}"


def test_wrong_credentials_are_reported(meta):
    body = b"<Error><Code>InvalidAccessKeyId</Code><Message>The key does not exist in our records</Message></Error>"
    head = f"HTTP/1.1 403 Forbidden\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    listening, address = answering(head + body)
    with listening:
        for use in (Buffer, lambda where: PartWriter(where, meta, "representation", 7)):
            with pytest.raises(
                TrajectoryError, match=r"^s3://bucket/a\S*: cannot be listed .*INVALID_ACCESS_KEY_ID"
            ) as caught:
                use(at(address, "KEY:SECRET@bucket/a"))
            assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("silent", [True, False])
def test_a_store_that_is_not_there_does_not_hang(monkeypatch, silent):
    monkeypatch.setattr(files, "REQUEST_SECONDS", 1.0)
    listening, address = answering(None)
    if not silent:
        listening.close()  # connections are refused
    with listening:
        began = time.monotonic()
        with pytest.raises(TrajectoryError, match=r"^s3://bucket/a: cannot be listed .*NETWORK_CONNECTION"):
            Buffer(at(address, "bucket/a"))
        assert time.monotonic() - began < 60


def test_a_store_that_goes_away_is_not_called_damaged(uri, write, meta, weights, monkeypatch):
    write(3, folder=uri)
    buffer = Buffer(uri)

    def gone(*_: Any) -> None:
        raise OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation: curlCode: 7")

    buffer.filesystem = Wrapped(buffer.filesystem, open_input_file=gone, get_file_info=gone)  # type: ignore[assignment]
    with pytest.raises(
        TrajectoryError, match=r"cannot be read: .*NETWORK_CONNECTION.*when the store answers"
    ) as caught:
        buffer.read("representation", 7, 0)
    assert "damaged" not in str(caught.value)


def test_a_process_that_used_the_store_ends_by_itself(uri, write):
    """Arrow's S3 library must be shut down before the process ends, also while a thread of ours still uses it."""
    write(3, folder=uri)
    script = """
import sys, threading
from lad_dist.trajectories import Buffer, claims
claims.REFRESH_SECONDS = 0.01
manager = claims.hold(sys.argv[1], "expert-0007", "me")
manager.__enter__()  # and never left
print(len(Buffer(sys.argv[1]).verify()))
"""
    command = [sys.executable, "-c", script, uri]
    ended = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=60, check=False,
                           capture_output=True, text=True)  # fmt: skip
    assert (ended.returncode, ended.stdout) == (0, "0\n"), ended.stderr


# --- claims -----------------------------------------------------------------------------------------------------------


def test_claims_in_a_store(uri, monkeypatch):
    monkeypatch.setattr(claims, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(claims, "REFRESH_SECONDS", 0.2)
    with claims.hold(uri, "expert-0007", "me") as held:
        assert held and objects(uri) == ["claims/expert-0007.json"]
        assert claims.foreign(uri, "expert-0007", "you").pid == os.getpid()
        assert claims.foreign(uri, "expert-0007", "me") is None
        with claims.hold(uri, "expert-0007", "you") as second:
            assert second is False
        first = files.list_files(*files.resolve(uri))[0].stamp
        deadline = time.monotonic() + 20
        while files.list_files(*files.resolve(uri))[0].stamp == first and time.monotonic() < deadline:
            time.sleep(0.1)  # the store's clock counts seconds
        assert files.list_files(*files.resolve(uri))[0].stamp != first, "not refreshed"
        assert Buffer(uri).parts == () and Buffer(uri).verify() == []
    assert objects(uri) == []


def test_stale_and_damaged_claims_in_a_store(uri, monkeypatch):
    monkeypatch.setattr(claims, "SETTLE_SECONDS", 0.0)
    filesystem, root = files.resolve(uri)
    record = claims._Record("elsewhere", 1, 1e9, "other", "", "t")
    for content in (b"", b"{", record.content()):
        with filesystem.open_output_stream(f"{root}/claims/expert-0007.json") as stream:
            stream.write(content)
        live = content == record.content()
        assert (claims.foreign(uri, "expert-0007", "me") is not None) == live
        with claims.hold(uri, "expert-0007", "me") as held:
            assert held is not live
    monkeypatch.setattr(claims, "STALE_SECONDS", 1.0)
    time.sleep(3)
    with claims.hold(uri, "expert-0007", "me") as held:
        assert held is True
    assert objects(uri) == []


def test_the_last_writer_of_a_claim_wins(uri, monkeypatch):
    """Both see no claim; who wrote first finds the other's when it looks again."""
    monkeypatch.setattr(claims, "SETTLE_SECONDS", 1.0)
    written, found = threading.Event(), {}

    def early() -> None:
        with claims.hold(uri, "expert-0007", "early") as held:
            found["early"] = held

    def put(self, path: str, content: bytes, original=claims._Store._put) -> None:
        original(self, path, content)
        written.set()

    monkeypatch.setattr(claims._Store, "_put", put)
    thread = threading.Thread(target=early)
    thread.start()
    assert written.wait(30)
    late = claims._place(uri, "expert-0007")
    late._put(late.path, claims._Record.mine("late").content())
    thread.join()
    assert found == {"early": False}
    assert claims.foreign(uri, "expert-0007", "early").owner == "late"


def test_a_claim_in_a_bucket_that_cannot_be_written(server):
    with pytest.raises((StorageError, TrajectoryError), match="nowhere"), \
            claims.hold(at(server, "nowhere/a"), "expert-0007", "me"):  # fmt: skip
        pytest.fail("not reached")
