"""What is common to all data sets: decoding, the long tail, validation, fingerprints, memory."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image
from small_datasets import picture, pixels, write_folders

from lad_dist.data import decoding
from lad_dist.data.datasets import load_splits
from lad_dist.errors import DataError


def folder(config, root, **fields):
    return config(dataset="image-folder", root=str(root), imbalance="natural", **fields)


def test_exponential_subset_of_files(config, tmp_path):
    root = write_folders(tmp_path, {"a": 6, "b": 5, "c": 7})
    splits = load_splits(config(dataset="image-folder", root=str(root), imbalance_factor=4))
    assert splits.full_counts == (6, 5, 7)
    assert splits.train.counts == (5, 2, 1)  # n_max is the size of the smallest class
    assert splits.train.labels_N.tolist() == [0] * 5 + [1, 1, 2]
    order = np.random.RandomState(42).permutation(7)
    np.testing.assert_array_equal(splits.train.images_NCHW[-1].numpy(), pixels(200 + int(order[0])))


def test_only_images_that_are_kept_are_decoded(config, tmp_path):
    root = write_folders(tmp_path, {"a": 6, "b": 6})
    unwanted = int(np.random.RandomState(42).permutation(6)[5])
    (root / "train" / "b" / f"{unwanted:02d}.png").write_bytes(b"would not decode")
    seen = []
    splits = load_splits(
        config(dataset="image-folder", root=str(root), imbalance_factor=3), on_progress=lambda *done: seen.append(done)
    )
    assert splits.train.counts == (6, 2)
    assert seen[-1] == (20, 20)  # 8 kept and 12 test images


def test_validation_comes_out_of_the_pool_first(config, tmp_path):
    root = write_folders(tmp_path, {"a": 6, "b": 6})
    fields = {"dataset": "image-folder", "root": str(root)}
    splits = load_splits(config(**fields, imbalance_factor=2, validation_per_class=2))
    assert splits.train.counts == (4, 2) and splits.validation.counts == (2, 2) and splits.full_counts == (6, 6)
    held = {image.numpy().tobytes() for image in splits.validation.images_NCHW}
    natural = load_splits(config(**fields, imbalance="natural", validation_per_class=2))
    assert natural.train.counts == (4, 4)
    for train in (splits.train, natural.train):
        assert not held & {image.numpy().tobytes() for image in train.images_NCHW}
    assert load_splits(config(**fields)).validation is None
    most = load_splits(config(**fields, imbalance="natural", validation_per_class=6))
    assert most.train.counts == (1, 1) and most.validation.counts == (5, 5)


def test_a_natural_tail_with_a_class_of_one_gives_validation_images(config, tmp_path):
    root = write_folders(tmp_path, {"a": 6, "b": 3, "c": 1})
    fields = {"dataset": "image-folder", "root": str(root), "validation_per_class": 5}
    splits = load_splits(config(**fields, imbalance="natural"))
    assert splits.train.counts == (1, 1, 1) and splits.validation.counts == (5, 2, 0)
    assert load_splits(config(**fields, imbalance_factor=1)).train.counts == (1, 1, 1)


def test_n_max_above_a_class_and_factor_above_n_max_are_refused(config, tmp_path):
    root = write_folders(tmp_path, {"a": 6, "b": 6})
    with pytest.raises(DataError, match=r"data.n_max: class 0 \(a\) has 6 images, but 7"):
        load_splits(config(dataset="image-folder", root=str(root), n_max=7))
    with pytest.raises(
        DataError, match=r"data.imbalance_factor: 1000 leaves class 1 \(b\).*largest usable factor is 6"
    ):
        load_splits(config(dataset="image-folder", root=str(root), imbalance_factor=1000))


def test_fingerprint_tells_images_labels_order_and_shape_apart(config):
    base = load_splits(config(dataset="digits", imbalance_factor=20)).train
    again = load_splits(config(dataset="digits", imbalance_factor=20)).train
    other = load_splits(config(dataset="digits", imbalance_factor=19)).train
    assert base.fingerprint() == again.fingerprint() != other.fingerprint()
    assert len(base.fingerprint()) == 64
    prints = {base.fingerprint()}
    again.images_NCHW[3, 0, 2, 2] ^= 1
    prints.add(again.fingerprint())
    again.images_NCHW[3, 0, 2, 2] ^= 1
    again.labels_N[0] = 9
    prints.add(again.fingerprint())
    prints.add(type(base)(base.images_NCHW.reshape(-1, 4, 4, 4), base.labels_N, base.class_names, "x").fingerprint())
    assert len(prints) == 4


# --- pixels -------------------------------------------------------------------------------------------------------


def test_not_square_is_refused_and_center_crop_cuts_the_middle(config, tmp_path):
    root = write_folders(tmp_path, {"a": 1, "b": 1})
    wide = picture(7, (12, 8))
    wide.save(root / "train" / "b" / "00.png")
    with pytest.raises(DataError, match=r"train/b/00.png: 12x8 pixels is not square; .*data.fit: center-crop"):
        load_splits(folder(config, root))
    splits = load_splits(folder(config, root, fit="center-crop"))
    np.testing.assert_array_equal(splits.train.images_NCHW[1].numpy(), pixels(7, (12, 8))[:, :, 2:10])
    tall = picture(7, (8, 12))
    tall.save(root / "train" / "a" / "00.png")  # the first image, which settles the format
    with pytest.raises(DataError, match=r"train/a/00.png: 8x12 pixels is not square"):
        load_splits(folder(config, root))
    assert load_splits(folder(config, root, fit="center-crop")).train.size == 8


def test_sizes_differ_without_image_size(config, tmp_path):
    root = write_folders(tmp_path, {"a": 1, "b": 1})
    picture(7, (10, 10)).save(root / "test" / "b" / "00.png")
    with pytest.raises(DataError, match=r"test/b/00.png: 10x10 pixels where the first image .* 8x8; .*data.image_size"):
        load_splits(folder(config, root))
    assert load_splits(folder(config, root, image_size=6)).test.images_NCHW.shape == (2, 3, 6, 6)


def test_resizing_is_antialiased_bilinear(config, tmp_path):
    root = write_folders(tmp_path, {"a": 1, "b": 1})
    stripes = np.zeros((16, 16, 3), dtype=np.uint8)
    stripes[:, ::2] = 254
    Image.fromarray(stripes).save(root / "train" / "a" / "00.png")
    small = load_splits(folder(config, root, image_size=4)).train.images_NCHW[0]
    assert (small.int() - 127).abs().max() < 40  # without antialiasing: only 0 and 254
    x = torch.tensor(pixels(100))[None].float()
    expected = torch.nn.functional.interpolate(x, (4, 4), mode="bilinear", antialias=True)[0]
    assert (load_splits(folder(config, root, image_size=4)).train.images_NCHW[1] - expected).abs().max() <= 1


def test_arrays_are_resized_and_coloured_too(config):
    splits = load_splits(config(dataset="digits", image_size=12, channels=3))
    assert splits.train.images_NCHW.shape[1:] == (3, 12, 12)
    assert torch.equal(splits.train.images_NCHW[:, 0], splits.train.images_NCHW[:, 2])


def test_grey_and_colour_mixed(config, tmp_path):
    root = write_folders(tmp_path, {"a": 2, "b": 1})
    picture(7, mode="L").save(root / "train" / "b" / "00.png")
    assert load_splits(folder(config, root)).train.channels == 3  # grey among colour becomes colour
    picture(7, mode="L").save(root / "train" / "a" / "00.png")
    with pytest.raises(DataError, match=r"train/a/01.png: a colour image \(mode RGB\).*data.channels: 3"):
        load_splits(folder(config, root))
    grey, colour = (load_splits(folder(config, root, channels=c)).train for c in (1, 3))
    np.testing.assert_array_equal(grey.images_NCHW[0].numpy(), pixels(7, mode="L"))
    np.testing.assert_array_equal(grey.images_NCHW[1, 0].numpy(), np.asarray(picture(1).convert("L")))
    np.testing.assert_array_equal(colour.images_NCHW[1].numpy(), pixels(1))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_usual_mode_decodes(config, tmp_path, mode):
    root = write_folders(tmp_path, {"a": 1, "b": 1})
    original = picture(7)
    if mode == "I;16":
        grey = np.asarray(original.convert("L")).astype(np.uint16)
        image, expected = Image.fromarray(grey * 257), grey.astype(np.uint8)
    else:
        image = original.convert(mode)
        expected = np.asarray(image.convert("L"))
    (root / "train" / "a" / "00.png").unlink()
    image.save(root / "train" / "a" / ("00.tif" if mode == "CMYK" else "00.png"))
    loaded = load_splits(folder(config, root, channels=1)).train.images_NCHW[0, 0].numpy()
    np.testing.assert_array_equal(loaded, expected)


def test_undecodable_images_are_named(config, tmp_path):
    root = write_folders(tmp_path, {"a": 2, "b": 2})
    file = root / "test" / "b" / "01.png"
    whole = file.read_bytes()
    for content in (b"", b"garbage", whole[:50], whole[: len(whole) // 2], whole[:60] + b"\xff" * 40 + whole[100:]):
        file.write_bytes(content)
        with pytest.raises(DataError, match=r"test/b/01.png: not a readable image"):
            load_splits(folder(config, root))
    file.unlink()
    Image.fromarray(np.zeros((8, 8), dtype=np.float32)).save(file.with_suffix(".tif"))
    with pytest.raises(DataError, match=r"test/b/01.tif: floating-point pixels"):
        load_splits(folder(config, root))


def test_order_is_kept_over_many_batches(config, tmp_path, monkeypatch):
    root = write_folders(tmp_path, {"a": 30, "b": 30})
    whole = load_splits(folder(config, root)).train
    monkeypatch.setattr(decoding, "_BATCH", 7)
    batched = load_splits(folder(config, root)).train
    assert torch.equal(whole.images_NCHW, batched.images_NCHW)
    np.testing.assert_array_equal(batched.images_NCHW[31].numpy(), pixels(101))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_images_of_imagenet_lt_load_within_3_gb(tmp_path):
    """115,846 files at 64x64, the whole process: libraries, labels, paths and images."""
    for i in range(4):
        picture(i, (64, 64)).save(tmp_path / f"{i}.jpg")
    lines = [f"{i % 4}.jpg {i % 1000}" for i in range(115_846)]
    (tmp_path / "train.txt").write_text("\n".join(lines))
    (tmp_path / "test.txt").write_text("\n".join(lines[:1000]))
    code = f"""
        from lad_dist.data.datasets import load_splits
        from lad_dist.recipe import DataConfig
        splits = load_splits(DataConfig(
            dataset="list", root={str(tmp_path)!r}, train="train.txt", test="test.txt", imbalance="natural"))
        assert len(splits.train) == 115_846, len(splits.train)
        # not getrusage: its maximum outlives exec, and may be the one of the process that started this one
        print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 3e9
