"""``replay_buffer_N.pt``: what other code reads of ours is what the buffer holds, and what we read of theirs is checked."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lad_dist.errors import Interrupted, StorageError, TrajectoryError
from lad_dist.models.convnet import build
from lad_dist.models.layout import Layout
from lad_dist.seeds import rng
from lad_dist.trajectories import BufferMeta, PartWriter, claims
from lad_dist.trajectories.reader import Buffer
from lad_dist.trajectories.replay import MANIFEST, complete_experts, export_pt, import_pt
from lad_dist.trajectories.replay_file import pt_files

EPOCHS = {"representation": 3, "classifier": 2}
GOLDEN = Path(__file__).parents[1] / "golden" / "lad_golden.npz"
MODULE = build(1, 8, 3, 4, 2, seed=0, purpose=("test",))
LAYOUT = Layout.of(MODULE)


@pytest.fixture
def meta() -> BufferMeta:
    return BufferMeta(
        experts_hash="aa11",
        data_fingerprint="ff00",
        class_counts=(50, 20, 5),
        parameters=tuple(zip(LAYOUT.names, LAYOUT.shapes, strict=True)),
        classifier_parameters=LAYOUT.classifier,
        recipe={"experts": {"epochs": EPOCHS["representation"], "classifier_epochs": EPOCHS["classifier"]}},
        versions={"torch": "2.13"},
    )


def row(meta: BufferMeta, stage: str, expert: int, epoch: int) -> np.ndarray:
    return rng(0, stage, expert, epoch).normal(size=meta.vector_length(stage)).astype(np.float32)


@pytest.fixture
def trained(tmp_path: Path, meta: BufferMeta) -> Callable[..., Buffer]:
    """Experts as if they had been trained here, in a buffer called ``name``."""

    def make(experts=range(5), name="buffer", stages=EPOCHS, lasts=None) -> Buffer:
        for stage in stages:
            for expert in experts:
                with PartWriter(tmp_path / name, meta, stage, expert, 2) as writer:
                    for epoch in range((lasts or EPOCHS)[stage] + 1):
                        writer.append(epoch, row(meta, stage, expert, epoch), *([0.5, 0.5, 1.0] if epoch else []))
        return Buffer(tmp_path / name)

    return make


def take(folder: Path, target: Path, meta: BufferMeta, stages=EPOCHS, **options) -> Buffer:
    for stage in stages:
        import_pt(pt_files(folder / stage), target, meta, stage, EPOCHS[stage], **options)
    return Buffer(target)


def theirs(meta: BufferMeta, experts: int, seed: int = 0) -> dict[str, list]:
    """Both stages as the published scripts collect them: ``[p.detach().cpu() for p in net.parameters()]`` after each epoch."""
    stages: dict[str, list] = {"representation": [], "classifier": []}
    for expert in range(experts):
        net = build(1, 8, 3, 4, 2, seed=seed, purpose=("theirs", expert))
        for stage, trajectories in stages.items():
            moving = list(net.parameters()) if stage == "representation" else list(net.classifier.parameters())
            timestamps = [[p.detach().clone() for p in net.parameters()]]
            for _ in range(EPOCHS[stage]):
                for p in moving:
                    p.data += torch.randn_like(p)
                timestamps.append([p.detach().clone() for p in net.parameters()])
            trajectories.append(timestamps)
    return stages


def save(stages: dict[str, list], folder: Path, per_file: int = 2) -> Path:
    for stage, trajectories in stages.items():
        (folder / stage).mkdir(parents=True, exist_ok=True)
        for n, first in enumerate(range(0, len(trajectories), per_file)):
            torch.save(trajectories[first : first + per_file], folder / stage / f"replay_buffer_{n}.pt")
    return folder


# --- there and back -------------------------------------------------------------------------------------------------


def test_round_trip_keeps_every_weight(tmp_path, meta, trained):
    buffer = trained()
    seen: list[Path] = []
    files = export_pt(buffer, tmp_path / "out", experts_per_file=2, on_file=seen.append)
    names = [f"{stage}/replay_buffer_{n}.pt" for stage in EPOCHS for n in range(3)]
    assert [str(f.relative_to(tmp_path / "out")) for f in files] == names and seen == files
    again = take(tmp_path / "out", tmp_path / "again", meta)
    assert again.digest() == buffer.digest()
    assert again.verify() == []


def test_other_code_reads_the_same_vectors(tmp_path, meta, trained):
    """The loading code of ``distill.py`` (MTT), ``DATM.py`` and LAD's ``load_buffer``, as written there."""
    buffer = trained()
    export_pt(buffer, tmp_path / "out", experts_per_file=2)
    experts: dict[str, list] = {}
    for stage in EPOCHS:
        expert_dir, n, loaded = str(tmp_path / "out" / stage), 0, []
        while os.path.exists(os.path.join(expert_dir, f"replay_buffer_{n}.pt")):
            loaded = loaded + torch.load(os.path.join(expert_dir, f"replay_buffer_{n}.pt"))
            n += 1
        assert n == 3
        experts[stage] = loaded
    for expert in range(5):
        for epoch in range(EPOCHS["representation"] + 1):
            flat = torch.cat([p.data.to("cpu").reshape(-1) for p in experts["representation"][expert][epoch]], 0)
            assert flat.numpy().tobytes() == buffer.read("representation", expert, epoch).tobytes()
        last = buffer.read("representation", expert, EPOCHS["representation"])
        for epoch in range(EPOCHS["classifier"] + 1):
            params = experts["classifier"][expert][epoch]
            whole = torch.cat([p.data.to("cpu").reshape(-1) for p in params], 0).numpy()
            assert whole[LAYOUT.span("backbone")].tobytes() == last[LAYOUT.span("backbone")].tobytes()
            assert whole[LAYOUT.span("classifier")].tobytes() == buffer.read("classifier", expert, epoch).tobytes()
            # LAD's representation phase cuts the classifier off like this
            assert sum(p.numel() for p in params[:-2]) == LAYOUT.span("backbone").stop
            net = build(1, 8, 3, 4, 2, seed=9, purpose=("fresh",))
            for mine, p in zip(net.parameters(), params, strict=True):
                assert mine.shape == p.shape


def test_the_order_of_parameters_is_the_official_one():
    """The golden file holds the names and shapes of the official ConvNet's ``named_parameters()``."""
    official = json.loads(str(np.load(GOLDEN)["param_names_shapes_json"]))
    ours = Layout.of(build(1, 16, 10, 16, 3, seed=0, purpose=("test",)))
    assert [[n, list(s)] for n, s in zip(ours.names, ours.shapes, strict=True)] == official


def test_files_of_other_code_become_a_buffer(tmp_path, meta):
    made = theirs(meta, 5)
    heard: list[int] = []
    folder = save(made, tmp_path / "theirs")
    buffer = take(folder, tmp_path / "buffer", meta, on_expert=heard.append)
    assert heard == [0, 1, 2, 3, 4] * 2
    assert buffer.experts("classifier") == buffer.experts("representation") == (0, 1, 2, 3, 4)
    for expert in range(5):
        for epoch in range(EPOCHS["representation"] + 1):
            flat = torch.cat([p.reshape(-1) for p in made["representation"][expert][epoch]])
            assert torch.equal(torch.from_numpy(buffer.read("representation", expert, epoch)), flat)
        for epoch in range(EPOCHS["classifier"] + 1):
            flat = torch.cat([p.reshape(-1) for p in made["classifier"][expert][epoch][-2:]])
            assert torch.equal(torch.from_numpy(buffer.read("classifier", expert, epoch)), flat)
    assert buffer.verify() == [] and meta.differences(buffer.meta) == []


def test_every_part_says_which_file_it_came_from(tmp_path, meta):
    import hashlib

    folder = save(theirs(meta, 3), tmp_path / "theirs")
    buffer = take(folder, tmp_path / "buffer", meta)
    for name in buffer.parts:
        file = folder / name.stage / f"replay_buffer_{name.expert // 2}.pt"
        total = hashlib.sha256(file.read_bytes()).hexdigest()
        assert buffer.footer(name).meta.versions == {"torch": "2.13", "imported_from": f"{file.name} sha256:{total}"}


def test_files_of_torch_before_1_6_are_read(tmp_path, meta):
    made = theirs(meta, 2)
    torch.save(made["representation"], tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert import_pt([tmp_path / "old.pt"], tmp_path / "buffer", meta, "representation", 3) == 2
    flat = torch.cat([p.reshape(-1) for p in made["representation"][1][2]])
    assert torch.equal(torch.from_numpy(Buffer(tmp_path / "buffer").read("representation", 1, 2)), flat)


def test_one_stage_alone(tmp_path, meta, trained):
    """MTT's and DATM's experts have no second stage."""
    buffer = trained(stages=["representation"])
    files = export_pt(buffer, tmp_path / "out", ["representation"])
    assert files == [tmp_path / "out" / "representation" / "replay_buffer_0.pt"]
    assert take(tmp_path / "out", tmp_path / "again", meta, ["representation"]).digest() == buffer.digest()
    with pytest.raises(TrajectoryError, match="no expert is complete in representation and classifier"):
        export_pt(buffer, tmp_path / "both")


# --- export ---------------------------------------------------------------------------------------------------------


def test_experts_that_are_not_complete_stay_out_of_both_stages(tmp_path, meta, trained):
    trained([0, 1, 3])
    buffer = trained([2], lasts={"representation": 3, "classifier": 1})
    assert complete_experts(buffer, "representation") == (0, 1, 2, 3)
    assert (
        complete_experts(buffer, "classifier") == complete_experts(buffer, "representation", "classifier") == (0, 1, 3)
    )
    export_pt(buffer, tmp_path / "out")
    again = take(tmp_path / "out", tmp_path / "again", meta)
    for stage, last in EPOCHS.items():  # numbers are positions: what was expert 3 is now expert 2, in both stages
        assert again.read(stage, 2, last).tobytes() == buffer.read(stage, 3, last).tobytes()


def test_files_that_are_there_are_not_replaced(tmp_path, meta, trained):
    buffer = trained()
    (tmp_path / "out" / "classifier").mkdir(parents=True)
    there = tmp_path / "out" / "classifier" / "replay_buffer_7.pt"
    there.write_text("mine")
    with pytest.raises(TrajectoryError, match=r"replay_buffer_7\.pt: already exists"):
        export_pt(buffer, tmp_path / "out")
    assert there.read_text() == "mine" and not (tmp_path / "out" / "representation").exists()
    (tmp_path / "out" / "classifier" / "notes.txt").write_text("mine")
    export_pt(buffer, tmp_path / "out", force=True)
    names = sorted(p.name for p in (tmp_path / "out" / "classifier").iterdir())
    assert names == [MANIFEST, "notes.txt", "replay_buffer_0.pt"]


def test_an_interrupted_export_continues(tmp_path, meta, trained):
    buffer = trained()

    def stop(file: Path) -> None:
        if file.name == "replay_buffer_1.pt":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_pt(buffer, tmp_path / "out", experts_per_file=2, on_file=stop)
    done = tmp_path / "out" / "representation" / "replay_buffer_0.pt"
    before = done.stat()
    assert not (tmp_path / "out" / "representation" / "replay_buffer_2.pt").exists()
    export_pt(buffer, tmp_path / "out", experts_per_file=2)
    assert done.stat().st_mtime_ns == before.st_mtime_ns
    assert take(tmp_path / "out", tmp_path / "again", meta).digest() == buffer.digest()
    with pytest.raises(TrajectoryError, match="from another export"):  # cut otherwise, so none of these files would fit
        export_pt(buffer, tmp_path / "out", experts_per_file=3)
    with pytest.raises(TrajectoryError, match="from another export"):  # other weights
        export_pt(trained(range(4), "other"), tmp_path / "out", experts_per_file=2)


def test_a_full_disk_is_reported_and_leaves_nothing_half_written(tmp_path, meta, trained):
    buffer = trained()
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = 4 * 5 * LAYOUT.size * 4
    try:
        for limit in (size // 2, size + 200):  # the temporary file, then the file itself
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(StorageError, match=r"replay_buffer_0\.pt: cannot be written: File too large"):
                export_pt(buffer, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in (tmp_path / "out" / "representation").iterdir()] == [MANIFEST]
    assert len(export_pt(buffer, tmp_path / "out")) == 2


def test_what_a_killed_export_leaves_is_removed(tmp_path, meta, trained):
    from lad_dist.rundir import host_name

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    folder = tmp_path / "out" / "representation"
    folder.mkdir(parents=True)
    left, alive = (folder / f".tmp-{host_name()}-{pid}-abc.pt" for pid in (dead.pid, os.getpid()))
    left.touch(), alive.touch()
    export_pt(trained(), tmp_path / "out")
    assert not left.exists() and alive.exists()


def test_export_needs_little_memory(tmp_path):
    """Anonymous memory (what the system cannot drop) stays at a few checkpoints where a file holds 40."""
    code = textwrap.dedent("""
        import sys
        from pathlib import Path
        import numpy as np
        from lad_dist.trajectories import BufferMeta, PartWriter
        from lad_dist.trajectories.reader import Buffer
        from lad_dist.trajectories.replay import export_pt, import_pt

        def anonymous():
            line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
            return int(line.split()[1]) * 1024

        folder, P = Path(sys.argv[1]), 1_000_000
        meta = BufferMeta("aa", "ff", (1, 1), (("features.weight", (P - 2,)), ("classifier.bias", (2,))), ("classifier.bias",),
                          {"experts": {"epochs": 19, "classifier_epochs": 1}})
        for expert in range(2):
            with PartWriter(folder / "buffer", meta, "representation", expert, 1) as writer:
                for epoch in range(20):
                    writer.append(epoch, np.full(P, epoch + expert, np.float32))
        most, before = 0, anonymous()
        import torch
        save = torch.save
        def watched(content, file):
            global most
            most = max(most, anonymous() - before)
            save(content, file)
            most = max(most, anonymous() - before)
        torch.save = watched
        export_pt(Buffer(folder / "buffer"), folder / "out", ["representation"])
        files = [folder / "out" / "representation" / "replay_buffer_0.pt"]
        most_in = before = anonymous()
        def look(expert):
            global most_in
            most_in = max(most_in, anonymous())
        import_pt(files, folder / "again", meta, "representation", 19, epochs_per_part=1, on_expert=look)
        print(most, most_in - before)
    """)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    out, back = map(int, done.stdout.split())
    whole = 2 * 20 * 4_000_000
    assert out < whole / 5 and back < whole / 4, f"{out / 1e6:.0f} MB out, {back / 1e6:.0f} MB in, of {whole / 1e6:.0f}"


# --- import: continuing, and not mixing -----------------------------------------------------------------------------


def test_import_again_changes_nothing(tmp_path, meta):
    folder = save(theirs(meta, 3), tmp_path / "theirs")
    buffer = take(folder, tmp_path / "buffer", meta)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "buffer").rglob("*.parquet")}
    take(folder, tmp_path / "buffer", meta)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "buffer").rglob("*.parquet")} == before
    assert buffer.digest() == Buffer(tmp_path / "buffer").digest()


def test_an_interrupted_import_continues(tmp_path, meta):
    folder = save(theirs(meta, 3), tmp_path / "theirs")
    whole = take(folder, tmp_path / "whole", meta).digest()

    def stop(expert: int) -> None:
        if expert == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(folder, tmp_path / "buffer", meta, on_expert=stop, epochs_per_part=1)
    (tmp_path / "buffer" / "representation" / "expert-0001" / "epochs-0003-0003.parquet").unlink()
    assert Buffer(tmp_path / "buffer").experts("representation") == (0, 1)
    assert take(folder, tmp_path / "buffer", meta, epochs_per_part=1).digest() == whole


def test_more_files_continue_where_the_first_ended(tmp_path, meta):
    folder = save(theirs(meta, 5), tmp_path / "theirs")
    for stage, last in EPOCHS.items():
        import_pt(pt_files(folder / stage)[:1], tmp_path / "buffer", meta, stage, last)
    for stage, last in EPOCHS.items():
        import_pt(pt_files(folder / stage)[1:], tmp_path / "buffer", meta, stage, last, first_expert=2)
    assert Buffer(tmp_path / "buffer").digest() == take(folder, tmp_path / "whole", meta).digest()


@pytest.mark.parametrize("there", [[0], [1], [7]], ids=["first", "second", "beyond"])
def test_experts_trained_here_are_not_mixed_with_others(tmp_path, meta, trained, there):
    folder = save(theirs(meta, 3), tmp_path / "theirs")
    before = trained(there, stages=["representation"]).digest()
    with pytest.raises(TrajectoryError, match=rf"expert {there[0]}.*trained here"):
        take(folder, tmp_path / "buffer", meta)
    assert Buffer(tmp_path / "buffer").digest() == before, "nothing may be written before that is noticed"


def test_other_imported_experts_are_not_replaced(tmp_path, meta):
    take(save(theirs(meta, 2), tmp_path / "a"), tmp_path / "buffer", meta)
    with pytest.raises(TrajectoryError, match="imported from other files"):
        take(save(theirs(meta, 2, seed=1), tmp_path / "b"), tmp_path / "buffer", meta)


def test_our_own_experts_may_come_back(tmp_path, meta, trained):
    buffer = trained()
    export_pt(buffer, tmp_path / "out")
    assert take(tmp_path / "out", tmp_path / "buffer", meta).digest() == buffer.digest()


def test_a_buffer_of_another_recipe_is_refused(tmp_path, meta):
    folder = save(theirs(meta, 1), tmp_path / "theirs")
    take(folder, tmp_path / "buffer", meta)
    with pytest.raises(TrajectoryError, match="another recipe"):
        take(folder, tmp_path / "buffer", replace(meta, experts_hash="bb22"))
    with pytest.raises(TrajectoryError, match=r"data_fingerprint differ"):
        take(folder, tmp_path / "buffer", replace(meta, data_fingerprint="ee"))


def test_an_expert_that_is_being_trained_is_left_alone(tmp_path, meta):
    folder = save(theirs(meta, 2), tmp_path / "theirs")
    with (
        claims.hold(tmp_path / "buffer", "expert-0001", "someone") as held,
        pytest.raises(TrajectoryError, match="expert 1 is being trained or imported by another process"),
    ):
        assert held
        take(folder, tmp_path / "buffer", meta)
    take(folder, tmp_path / "buffer", meta)


# --- import: files that do not fit ----------------------------------------------------------------------------------


def broken(change: Callable[[list], object], stage: str = "representation") -> Callable[[dict[str, list]], None]:
    def apply(stages: dict[str, list]) -> None:
        change(stages[stage])

    return apply


def _set(tensors: list, index: int, value: torch.Tensor) -> None:
    tensors[index] = value


NAMES = LAYOUT.names
FAULTS = {
    "epochs": (broken(lambda x: x[1].pop()), r"expert 1: has 3 checkpoints where .* has 4.*experts\.epochs=2"),
    "unequal epochs": (broken(lambda x: x[1].append(x[1][0])), "expert 1: has 5 checkpoints and .* expert 0 has 4"),
    "tensors": (broken(lambda x: x[0][2].pop()), r"expert 0, epoch 2: has 9 tensors .* 10 parameters \(features\.0\.weight"),
    "shape": (
        broken(lambda x: _set(x[1][0], 4, torch.zeros(5, 4, 3, 3))),
        r"epoch 0: is another network: features\.4\.weight is 5x4x3x3 where the recipe's is 4x4x3x3",
    ),
    "transposed": (
        broken(lambda x: [_set(e, 8, e[8].T.contiguous()) for e in x[0]]),
        r"classifier\.weight is .* where the recipe's is",
    ),
    "half": (broken(lambda x: _set(x[0][0], 0, x[0][0][0].half())), r"features\.0\.weight is a strided tensor of torch\.float16"),
    "double": (broken(lambda x: _set(x[0][0], 0, x[0][0][0].double())), r"torch\.float64.*valid: dense torch\.float32"),
    "sparse": (broken(lambda x: _set(x[0][0], 1, x[0][0][1].to_sparse())), r"features\.0\.bias is a sparse_coo tensor"),
    "not finite": (broken(lambda x: x[1][3][9].fill_(torch.nan)), r"expert 1, epoch 3: 3 values of classifier\.bias are NaN"),
    "no movement": (broken(lambda x: _set(x, 0, [x[0][0]] * 4)), "expert 0: epoch [13] equals epoch 0, so there is no trajectory"),
    "a network's state": (broken(lambda x: _set(x[0], 1, {"w": torch.zeros(1)})), "epoch 1: is a dict"),
    "numbers": (broken(lambda x: _set(x[0], 1, [1, 2])), r"epoch 1: is a list of 2 \(int\)"),
    "no experts": (broken(lambda x: x.clear()), "holds a list of 0"),
    "thawed": (
        broken(lambda x: x[1][2][0].add_(1), "classifier"),
        "expert 1, epoch 2: its backbone is not that of the last representation checkpoint",
    ),
    "order": (broken(lambda x: x.reverse(), "classifier"), "expert 0, epoch 0: its backbone .* in the same order"),
    "classifiers only": (
        broken(lambda x: [_set(e, i, t[-2:]) for e in x for i, t in enumerate(e)], "classifier"),
        "has 2 tensors where .* 10 parameters .* whole networks",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_file_that_does_not_fit_is_named(tmp_path, meta, change, message):
    made = theirs(meta, 2)
    change(made)
    if made["representation"]:
        folder = save(made, tmp_path / "theirs")
    else:
        folder = tmp_path / "theirs"
        (folder / "representation").mkdir(parents=True)
        torch.save([], folder / "representation" / "replay_buffer_0.pt")
    with pytest.raises(TrajectoryError, match=message) as caught:
        take(folder, tmp_path / "buffer", meta)
    assert "replay_buffer_0.pt" in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_classifier_experts_alone_have_nothing_to_stand_on(tmp_path, meta):
    folder = save(theirs(meta, 1), tmp_path / "theirs")
    with pytest.raises(TrajectoryError, match=r"representation stage of expert 0, .*import that stage first"):
        take(folder, tmp_path / "buffer", meta, ["classifier"])


class Hostile:
    def __reduce__(self):
        return os.system, ("touch harmed",)


def hostile(path: Path) -> None:
    torch.save([[[Hostile()]]], path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    """One bit of a weight, which torch does not notice."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def compressed(path: Path) -> None:
    with zipfile.ZipFile(path) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, record in records.items():
            new.writestr(name, record)


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")


def scripted(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(path)


DAMAGE = {
    "code": (hostile, r"was not loaded: it asks for posix\.system"),
    "half a file": (truncated, "is damaged, or not a file of torch.save"),
    "a flipped bit": (flipped, "does not match its checksum"),
    "compressed": (compressed, "damaged"),
    "another zip": (other_zip, "is damaged, or not a file of torch.save"),
    "text": (lambda p: p.write_text("no"), "is damaged, or not a file of torch.save"),
    "empty": (lambda p: p.write_bytes(b""), "is damaged, or not a file of torch.save"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "cannot be read: Is a directory"),
    "TorchScript": (scripted, "is damaged, or not a file of torch.save"),
    "a state dict": (lambda p: torch.save(MODULE.state_dict(), p), "it holds a OrderedDict"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_one_message_that_names_the_file(tmp_path, meta, monkeypatch, damage, message):
    monkeypatch.chdir(tmp_path)
    folder = save(theirs(meta, 2), tmp_path / "theirs", per_file=1)
    path = folder / "representation" / "replay_buffer_1.pt"
    damage(path)
    with pytest.raises(TrajectoryError, match=message) as caught:
        take(folder, tmp_path / "buffer", meta)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert "weights_only" not in str(caught.value), "torch's advice is to load it without protection"
    assert not (tmp_path / "harmed").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", ["new", "old"])
def test_random_damage_never_escapes_as_another_error(tmp_path, meta, protocol):
    """Whatever the bytes: a TrajectoryError; or the very weights that were saved, where the format has checksums."""
    path, draw = tmp_path / "replay_buffer_0.pt", random.Random(0)
    torch.save(theirs(meta, 1)["representation"], path, _use_new_zipfile_serialization=protocol == "new")
    sound = path.read_bytes()
    import_pt([path], tmp_path / "sound", meta, "representation", 3)
    digest = Buffer(tmp_path / "sound").digest()
    for trial in range(60):
        content = bytearray(sound)
        for _ in range(draw.choice([1, 1, 4])):
            where = draw.randrange(len(content) if trial % 2 else min(len(content), 4000))
            content[where] = draw.randrange(256)
        path.write_bytes(content)
        try:
            import_pt([path], tmp_path / f"buffer-{trial}", meta, "representation", 3)
        except TrajectoryError as error:
            assert str(path) in str(error)
        else:
            assert protocol == "old" or Buffer(tmp_path / f"buffer-{trial}").digest() == digest


def test_an_interruption_is_not_taken_for_damage(tmp_path, meta, monkeypatch):
    """SIGTERM is an exception wherever the code happens to be, for example in torch.load."""
    folder = save(theirs(meta, 1), tmp_path / "theirs")

    def stop(*args, **options):
        raise Interrupted("interrupted by SIGTERM")

    monkeypatch.setattr(torch, "load", stop)
    with pytest.raises(Interrupted):
        take(folder, tmp_path / "buffer", meta)


# --- names ----------------------------------------------------------------------------------------------------------


def test_files_count_by_their_numbers(tmp_path):
    for n in range(12):
        (tmp_path / f"replay_buffer_{n}.pt").touch()
    (tmp_path / "ckpt").mkdir()  # LAD's first stage keeps its last networks there
    (tmp_path / "replay_buffer_01.pt").touch()
    assert [p.name for p in pt_files(tmp_path)] == [f"replay_buffer_{n}.pt" for n in range(12)]
    (tmp_path / "replay_buffer_3.pt").unlink()
    with pytest.raises(TrajectoryError, match=r"replay_buffer_3\.pt: is missing"):
        pt_files(tmp_path)
    with pytest.raises(TrajectoryError, match=r"holds no replay_buffer_N\.pt"):
        pt_files(tmp_path / "ckpt")
    with pytest.raises(TrajectoryError, match="is not a folder"):
        pt_files(tmp_path / "nothing")


def test_a_file_named_twice_is_refused(tmp_path, meta):
    file = pt_files(save(theirs(meta, 1), tmp_path / "theirs") / "representation")[0]
    with pytest.raises(TrajectoryError, match="is named twice"):
        import_pt([file, file], tmp_path / "buffer", meta, "representation", 3)
    with pytest.raises(TrajectoryError, match=r"no replay_buffer_N\.pt was named"):
        import_pt([], tmp_path / "buffer", meta, "representation", 3)
