from __future__ import annotations

import os
import random
import stat

import numpy as np
import pytest
import torch

from lad_dist.data import whitening as whitening_module
from lad_dist.data.prepared import PreparedSet
from lad_dist.data.whitening import Whitening, fit_zca
from lad_dist.errors import DataError, StorageError


def images(count: int = 60, shape: tuple[int, int, int] = (3, 6, 6), seed: int = 0) -> torch.Tensor:
    """Neighbouring pixels resemble each other, as in photographs."""
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.nn.functional.interpolate(
        torch.rand(count, shape[0], 3, 3, generator=generator), shape[1:], mode="bilinear"
    )
    return (smooth * 255).round().to(torch.uint8)


def test_zca_equals_the_official_one(golden):
    train, test = golden["zca/train"], golden["zca/test"]
    mean_D, matrix_DD, inverse_DD = fit_zca(train.reshape(len(train), -1), float(golden["zca/eps"]))
    for name, ours in (("mean", mean_D[None]), ("matrix", matrix_DD), ("inverse", inverse_DD)):
        np.testing.assert_allclose(ours.numpy(), golden[f"zca/{name}"], rtol=0, atol=1e-9, err_msg=name)
    for name, x in (("train_out", train), ("test_out", test)):
        ours = (torch.from_numpy(x).flatten(1) - mean_D) @ matrix_DD
        np.testing.assert_allclose(
            ours.reshape(x.shape).numpy(), golden[f"zca/{name}"], rtol=0, atol=1e-9, err_msg=name
        )


def test_zca_of_uint8_images_equals_zca_of_their_floats(monkeypatch):
    x = images()
    mean_D, matrix_DD, inverse_DD = fit_zca(x.flatten(1).double() / 255, 0.1)
    monkeypatch.setattr(whitening_module, "_CHUNK_VALUES", 7 * 108)  # several chunks, the last of them partial
    fitted = Whitening.fit(x, "zca", 0.1)
    torch.testing.assert_close(fitted.mean, mean_D.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(fitted.matrix, matrix_DD.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(fitted.inverse, inverse_DD.float(), rtol=0, atol=1e-6)


def test_large_images_are_fitted_in_float32_to_the_same_numbers(monkeypatch):
    x = images()
    exact = Whitening.fit(x, "zca", 0.1)
    monkeypatch.setattr(whitening_module, "_FLOAT64_UP_TO", 0)
    torch.testing.assert_close(Whitening.fit(x, "zca", 0.1).matrix, exact.matrix, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["zca", "standardize", "none"])
@pytest.mark.parametrize("channels", [1, 3])
def test_inverting_gives_the_pixels_back(kind, channels, monkeypatch):
    x = images(shape=(channels, 6, 6))
    fitted = Whitening.fit(x, kind, 0.1)
    assert fitted.shape == (channels, 6, 6)
    whole = fitted.apply(x)
    assert whole.dtype == torch.float32 and whole.shape == x.shape
    torch.testing.assert_close(fitted.invert(whole), x.float() / 255, rtol=0, atol=1e-5)
    torch.testing.assert_close(fitted.apply_float(x.float() / 255), whole)
    monkeypatch.setattr(whitening_module, "_CHUNK_VALUES", 7 * 36)
    torch.testing.assert_close(fitted.apply(x), whole)


PUBLISHED_MEAN = (0.4914, 0.4822, 0.4465)


@pytest.mark.parametrize("normalize", ["fitted", "published"])
def test_normalising_before_zca_is_zca_of_normalised_images(normalize):
    x = images()
    pixels = x.double() / 255
    if normalize == "fitted":
        mean, std = pixels.mean(dim=(0, 2, 3)), pixels.std(dim=(0, 2, 3), correction=0)
    else:
        mean, std = torch.tensor(PUBLISHED_MEAN).double(), torch.tensor(whitening_module.PUBLISHED_STD).double()
    normalised = ((pixels - mean[:, None, None]) / std[:, None, None]).flatten(1)
    mean_D, matrix_DD, _ = fit_zca(normalised, 0.1)
    expected = ((normalised - mean_D) @ matrix_DD).reshape(x.shape).float()
    fitted = Whitening.fit(x, "zca", 0.1, normalize=normalize)
    torch.testing.assert_close(fitted.apply(x), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(fitted.invert(fitted.apply(x)), x.float() / 255, rtol=0, atol=1e-5)
    assert (fitted.apply(x) - Whitening.fit(x, "zca", 0.1).apply(x)).abs().max() > 0.1


def test_a_whitening_with_normalisation_survives_its_file(tmp_path):
    fitted = Whitening.fit(images(), "zca", 0.1, normalize="published")
    fitted.save(tmp_path / "whitening.safetensors")
    assert torch.equal(Whitening.load(tmp_path / "whitening.safetensors").apply(images()), fitted.apply(images()))


def test_normalising_what_has_no_constants_or_no_deviation_is_refused():
    with pytest.raises(DataError, match=r"normalize_before_zca: published constants are for 3 channels.*have 1"):
        Whitening.fit(images(shape=(1, 6, 6)), "zca", normalize="published")
    flat = images()
    flat[:, 1] = 7
    with pytest.raises(DataError, match=r"data.normalize_before_zca: fitted: channel 1 is constant"):
        Whitening.fit(flat, "zca", normalize="fitted")


def test_zca_flattens_the_spectrum():
    """The covariance's eigenvalues s become s / (s + eps)."""
    x = images(count=400, shape=(1, 6, 6))
    before, after = (torch.cov(y.flatten(1).T) for y in (x.float() / 255, Whitening.fit(x, "zca", 0.01).apply(x)))
    s = torch.linalg.eigvalsh(before.double())
    torch.testing.assert_close(torch.linalg.eigvalsh(after.double()), s / (s + 0.01), rtol=0, atol=1e-5)


def test_standardize_gives_each_channel_mean_0_and_deviation_1():
    x = images()
    y = Whitening.fit(x, "standardize").apply(x)
    torch.testing.assert_close(y.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.std(dim=(0, 2, 3), correction=0), torch.ones(3), rtol=0, atol=1e-5)


def test_inverse_is_not_clamped():
    fitted = Whitening.fit(images(), "zca", 0.1)
    assert fitted.invert(torch.full((1, 3, 6, 6), 50.0)).max() > 1


@pytest.mark.parametrize("kind", ["zca", "standardize", "none"])
def test_saved_whitening_loads_bit_for_bit(kind, tmp_path):
    fitted = Whitening.fit(images(), kind, 0.05)
    fitted.save(tmp_path / "whitening.safetensors")
    loaded = Whitening.load(tmp_path / "whitening.safetensors")
    assert (loaded.kind, loaded.eps, loaded.shape) == (fitted.kind, 0.05, (3, 6, 6))
    for name in ("mean", "matrix", "inverse"):
        assert torch.equal(getattr(loaded, name), getattr(fitted, name))


def test_damaged_missing_or_foreign_file_is_refused(tmp_path):
    file = tmp_path / "whitening.safetensors"
    with pytest.raises(DataError, match=r"whitening.safetensors"):
        Whitening.load(file)
    Whitening.fit(images(), "zca").save(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match=r"not a readable whitening"):
        Whitening.load(file)
    from safetensors.torch import save_file

    save_file({"mean": torch.zeros(1)}, file)
    with pytest.raises(DataError, match=r"format None; valid: 'lad-dist whitening 2'"):
        Whitening.load(file)


@pytest.mark.parametrize("kind", ["zca", "standardize", "none"])
def test_no_flipped_bit_passes(kind, tmp_path):
    file = tmp_path / "whitening.safetensors"
    Whitening.fit(images(shape=(1, 3, 3)), kind).save(file)
    good, draws = file.read_bytes(), random.Random(0)
    header = int.from_bytes(good[:8], "little") + 8
    for place in (*range(header), *(draws.randrange(len(good)) for _ in range(200))):
        bad = bytearray(good)
        bad[place] ^= 1 << draws.randrange(8)
        file.write_bytes(bad)
        with pytest.raises(DataError, match=r"whitening\.safetensors: "):
            Whitening.load(file)


def test_a_file_of_the_format_without_a_checksum_is_still_read(tmp_path):
    from safetensors.torch import save_file

    fitted, file = Whitening.fit(images(), "standardize", 0.05), tmp_path / "whitening.safetensors"
    metadata = {"format": "lad-dist whitening 1", "kind": "standardize", "eps": "0.05", "shape": "3,6,6"}
    save_file({"mean": fitted.mean, "matrix": fitted.matrix, "inverse": fitted.inverse}, file, metadata)
    assert torch.equal(Whitening.load(file).matrix, fitted.matrix)


def test_the_file_is_the_same_byte_for_byte_and_honours_the_umask(tmp_path):
    fitted, made = Whitening.fit(images(), "zca"), set()
    for k, mask in enumerate([0o022, 0o027, 0o077] * 5):
        file, before = tmp_path / f"{k}.safetensors", os.umask(mask)
        try:
            fitted.save(file)
        finally:
            os.umask(before)
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~mask
        made.add(file.read_bytes())
    assert len(made) == 1


def test_saving_where_no_folder_is_says_so(tmp_path):
    with pytest.raises(StorageError, match=r"could not be written"):
        Whitening.fit(images(), "none").save(tmp_path / "absent" / "whitening.safetensors")


def test_what_cannot_be_whitened_is_refused():
    with pytest.raises(DataError, match=r"1 images have no covariance"):
        Whitening.fit(images(1), "zca")
    flat = images()
    flat[:, 1] = 7
    with pytest.raises(DataError, match=r"channel 1 is constant"):
        Whitening.fit(flat, "standardize")
    with pytest.raises(DataError, match=r"data.zca_eps: 0"):
        Whitening.fit(torch.full((5, 1, 4, 4), 9, dtype=torch.uint8), "zca", 0.0)
    with pytest.raises(DataError, match=r"do not match a whitening fitted to"):
        Whitening.fit(images(), "zca").apply(images(shape=(1, 6, 6)))


@pytest.mark.parametrize("kind", ["zca", "standardize", "none"])
def test_prepared_set_hands_out_the_same_batches_resident_or_not(kind):
    x, labels = images(), torch.arange(60) % 7
    fitted = Whitening.fit(x, kind)
    resident = PreparedSet(x, labels, fitted, budget_bytes=x.numel() * 4)
    lazy = PreparedSet(x, labels, fitted, budget_bytes=x.numel() * 4 - 1)
    assert resident.resident and not lazy.resident and len(lazy) == 60
    indices = torch.tensor([5, 59, 0, 5])
    for prepared in (resident, lazy):
        batch, batch_labels = prepared.batch(indices)
        assert batch.dtype == torch.float32 and batch_labels.tolist() == [5, 3, 0, 5]
        torch.testing.assert_close(batch, fitted.apply(x)[indices])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_whitening_on_a_gpu_equals_the_one_on_the_cpu():
    x = images()
    on_gpu, on_cpu = Whitening.fit(x, "zca", device="cuda"), Whitening.fit(x, "zca")
    torch.testing.assert_close(on_gpu.apply(x).cpu(), on_cpu.apply(x), rtol=0, atol=1e-4)
    batch, labels = PreparedSet(x, torch.arange(60), on_cpu, "cuda", budget_bytes=0).batch(torch.tensor([3]))
    assert batch.device.type == labels.device.type == "cuda"
