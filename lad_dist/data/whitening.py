"""Whitening, fitted on the long-tailed training set and applied to all images: training, test and synthetic.

Pixels are scaled to [0, 1] (uint8 / 255) and flattened to D = C*H*W values.

    zca          mean and covariance over all D values; (x - mean) @ U (S + eps)^(-1/2) U^T, where covariance = U S U^T
                 (method: Bell and Sejnowski 1997; Coates, Ng and Lee 2011 for eps)
    standardize  (x - mean) / std of each channel
    none         x

Before ZCA each channel may be normalised, x' = (x - m) / s (``normalize``); combined with ZCA this is one linear map,
so the stored matrix is diag(1/s) U (S + eps)^(-1/2) U^T with U S U^T the covariance of x', and the inverse is exact.
ZCA keeps pixels in place, and its inverse U (S + eps)^(1/2) U^T converts whitened images back to pictures.

Cost of zca: N D^2 multiply-adds for the covariance and about 10 D^3 for the eigenvectors; about 5 D^2 numbers of memory
at the peak, in float64 up to D = 4096 (3x32x32 is 3072: 0.4 GB) and in float32 beyond (3x64x64 is 12288: 3 GB). The
training set itself is converted to floats only a few hundred images at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from lad_dist.errors import DataError, StorageError
from lad_dist.rundir import load_tensors, save_tensors

Kind = Literal["zca", "standardize", "none"]
Normalize = Literal["none", "fitted", "published"]
Shape = tuple[int, int, int]  # C, H, W
PUBLISHED_STD = (0.2023, 0.1994, 0.2010)
"""Red, green and blue, as the official code normalises CIFAR-100-LT (github.com/ichbill/LTDD, utils/utils_baseline.py).

Its means (0.4914, 0.4822, 0.4465) cancel: ZCA subtracts the mean of its input.
"""
_KINDS: tuple[Kind, ...] = get_args(Kind)

_FORMAT, _WITHOUT_SUM = "lad-dist whitening 2", "lad-dist whitening 1"  # the first has a checksum
_FLOAT64_UP_TO = 4096  # values per image, D
_CHUNK_VALUES = 4_000_000  # values converted to floats at a time


def fit_zca(
    x_ND: npt.NDArray[np.floating] | torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit ZCA to N float rows of D values, in float64: mean (D,), matrix (D, D), inverse (D, D).

    Covariance over N - 1. Raises ``DataError`` for fewer than two rows.
    """
    rows = torch.as_tensor(x_ND)
    _check_enough(len(rows))
    step = _chunk_rows(rows.shape[1])
    mean_D = rows.mean(dim=0, dtype=torch.float64)
    chunks = (rows[i : i + step].to(torch.float64) - mean_D for i in range(0, len(rows), step))
    return mean_D, *_zca_matrices(_covariance(chunks, len(rows), mean_D), eps)


@dataclass(frozen=True, eq=False)
class Whitening:
    """A fitted whitening. All tensors are float32 and on one device."""

    kind: Kind
    eps: float
    shape: Shape
    mean: torch.Tensor  # zca (D,); standardize (C,); none (0,)
    matrix: torch.Tensor  # zca (D, D); standardize (C,), 1 / std; none (0,)
    inverse: torch.Tensor  # zca (D, D); standardize (C,), std; none (0,)

    @classmethod
    def fit(
        cls,
        images_NCHW: torch.Tensor,
        kind: Kind,
        eps: float = 0.1,
        device: torch.device | str = "cpu",
        normalize: Normalize = "none",
    ) -> Whitening:
        """Fit to uint8 images; computed and returned on ``device``.

        The same images give the same numbers on the same kind of device with the same number of threads; elsewhere they
        agree to rounding, so a run stores its whitening and does not refit it. Raises ``DataError`` if the images
        cannot be whitened this way.
        """
        assert images_NCHW.dtype == torch.uint8 and images_NCHW.ndim == 4
        device = torch.device(device)
        channels, height, width = images_NCHW.shape[1:]
        if kind == "zca":
            mean, matrix, inverse = _fit_zca_uint8(images_NCHW, eps, device, _std_before_zca(images_NCHW, normalize))
        elif kind == "standardize":
            mean, std = _channel_statistics(images_NCHW)
            matrix, inverse = 1 / std, std
        else:
            mean = matrix = inverse = torch.empty(0)
        tensors = (tensor.to(device, torch.float32).contiguous() for tensor in (mean, matrix, inverse))
        return cls(kind, float(eps), (int(channels), int(height), int(width)), *tensors)

    def agrees(self, other: Whitening) -> bool:
        """Return whether both whiten images alike, but for rounding: equal images fitted on two machines do."""
        if (self.kind, self.shape) != (other.kind, other.shape):
            return False
        pairs = ((self.mean, other.mean), (self.matrix, other.matrix))
        return all(torch.allclose(a.cpu(), b.cpu(), rtol=1e-3, atol=1e-4) for a, b in pairs)

    @property
    def device(self) -> torch.device:
        """Device of the tensors, and of the images that ``apply_float`` and ``invert`` take."""
        return self.mean.device

    def to(self, device: torch.device | str) -> Whitening:
        """Return the same whitening on another device."""
        moved = (tensor.to(device) for tensor in (self.mean, self.matrix, self.inverse))
        return Whitening(self.kind, self.eps, self.shape, *moved)

    def apply(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Whiten uint8 images (on any device) to float32 images (N, C, H, W) on this whitening's device.

        Chunk sizes depend only on the images' shape, so equal calls give equal bits.
        """
        assert images_NCHW.dtype == torch.uint8
        out_NCHW = torch.empty(images_NCHW.shape, dtype=torch.float32, device=self.device)
        step = _chunk_rows(images_NCHW[0].numel()) if len(images_NCHW) else 1
        for i in range(0, len(images_NCHW), step):
            chunk = images_NCHW[i : i + step].to(self.device).to(torch.float32).div_(255)
            out_NCHW[i : i + step] = self.apply_float(chunk)
        return out_NCHW

    def apply_float(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Whiten float images in [0, 1] to (N, C, H, W); differentiable."""
        self._check_shape(images_NCHW)
        if self.kind == "none":
            return images_NCHW
        if self.kind == "standardize":
            return (images_NCHW - self.mean[:, None, None]) * self.matrix[:, None, None]
        return ((images_NCHW.flatten(1) - self.mean) @ self.matrix).reshape(images_NCHW.shape)

    def invert(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Map whitened float images back to the scale of [0, 1], without clamping (N, C, H, W); differentiable."""
        self._check_shape(images_NCHW)
        if self.kind == "none":
            return images_NCHW
        if self.kind == "standardize":
            return images_NCHW * self.inverse[:, None, None] + self.mean[:, None, None]
        return (images_NCHW.flatten(1) @ self.inverse + self.mean).reshape(images_NCHW.shape)

    def pixels(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        """Return whitened images as 8-bit pixels, uint8 of the same shape: undone, clipped to [0, 1], rounded."""
        return (self.invert(images_NCHW).clamp(0, 1) * 255).round().to(torch.uint8)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file to ``path`` (publishing is up to the caller). Raises ``StorageError``."""
        tensors = {"mean": self.mean, "matrix": self.matrix, "inverse": self.inverse}
        metadata = {
            "format": _FORMAT,
            "kind": self.kind,
            "eps": repr(self.eps),
            "shape": ",".join(str(size) for size in self.shape),
        }
        try:
            save_tensors(tensors, Path(path), metadata)
        except OSError as error:
            raise StorageError(f"{path}: the whitening could not be written ({error})") from error

    @classmethod
    def load(cls, path: Path | str, device: torch.device | str = "cpu") -> Whitening:
        """Load a file written by ``save``. Raises ``DataError`` if it is missing, damaged or something else."""
        try:
            tensors, metadata = load_tensors(Path(path))
            if metadata.get("format") not in (_FORMAT, _WITHOUT_SUM):
                raise DataError(f"{path}: format {metadata.get('format')!r}; valid: {_FORMAT!r}")
            if set(metadata) != {"format", "kind", "eps", "shape"} | (
                {"sha256"} if metadata["format"] == _FORMAT else set()
            ):
                raise ValueError(f"its metadata are {', '.join(sorted(metadata))}")
            channels, height, width = (int(size) for size in metadata["shape"].split(","))
            kind, eps = _KINDS[_KINDS.index(metadata["kind"])], float(metadata["eps"])
            mean, matrix, inverse = (tensors[name].to(device).clone() for name in ("mean", "matrix", "inverse"))
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{path}: not a readable whitening ({error}); restore it from a backup: all that was trained with it needs it"
            ) from error
        return cls(kind, eps, (channels, height, width), mean, matrix, inverse)

    def _check_shape(self, images_NCHW: torch.Tensor) -> None:
        if tuple(images_NCHW.shape[1:]) != self.shape:
            raise DataError(
                f"images of shape {tuple(images_NCHW.shape[1:])} do not match a whitening fitted to {self.shape}"
            )


def _chunk_rows(values_per_row: int) -> int:
    return max(1, _CHUNK_VALUES // values_per_row)


def _check_enough(count: int) -> None:
    if count < 2:
        raise DataError(f"data.whitening: {count} images have no covariance; valid: 2 or more, or whitening: none")


def _std_before_zca(images_NCHW: torch.Tensor, normalize: Normalize) -> torch.Tensor | None:
    """Return the standard deviation (C,) that divides each channel before ZCA; None for no normalisation."""
    if normalize == "none":
        return None
    if normalize == "fitted":
        return _channel_statistics(images_NCHW, "data.normalize_before_zca: fitted")[1]
    if images_NCHW.shape[1] != len(PUBLISHED_STD):
        raise DataError(
            f"data.normalize_before_zca: published constants are for 3 channels, and the images have "
            f"{images_NCHW.shape[1]}; valid: fitted, none, or data.channels: 3"
        )
    return torch.tensor(PUBLISHED_STD, dtype=torch.float64)


def _fit_zca_uint8(
    images_NCHW: torch.Tensor, eps: float, device: torch.device, std_C: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``fit_zca`` for uint8 images / 255, each channel divided by ``std_C`` first.

    The mean (of the pixels) is exact: sums of uint8 are integers.
    """
    count, values = len(images_NCHW), images_NCHW[0].numel() if len(images_NCHW) else 0
    _check_enough(count)
    dtype = torch.float64 if values <= _FLOAT64_UP_TO else torch.float32
    rows_ND, step = images_NCHW.flatten(1), _chunk_rows(values)
    sum_D = torch.zeros(values, dtype=torch.int64, device=rows_ND.device)
    for i in range(0, count, step):
        sum_D += rows_ND[i : i + step].sum(dim=0, dtype=torch.int64)
    mean_D = (sum_D.to(torch.float64) / (255 * count)).to(device)
    mean_of_dtype = mean_D.to(dtype)

    def centred() -> Iterator[torch.Tensor]:
        for i in range(0, count, step):
            yield rows_ND[i : i + step].to(device).to(dtype).div_(255).sub_(mean_of_dtype)

    covariance_DD = _covariance(centred(), count, mean_of_dtype)
    if std_C is None:
        return mean_D, *_zca_matrices(covariance_DD, eps)
    std_D = std_C.to(device, dtype).repeat_interleave(values // len(std_C))
    matrix_DD, inverse_DD = _zca_matrices(covariance_DD / std_D / std_D[:, None], eps)
    return mean_D, matrix_DD / std_D[:, None], inverse_DD * std_D


def _covariance(centred_chunks: Iterator[torch.Tensor], count: int, like_D: torch.Tensor) -> torch.Tensor:
    """Return the sum of x^T x over the chunks (n, D), divided by count - 1: (D, D)."""
    covariance_DD = torch.zeros(len(like_D), len(like_D), dtype=like_D.dtype, device=like_D.device)
    for chunk_nD in centred_chunks:
        covariance_DD.addmm_(chunk_nD.T, chunk_nD)
    return covariance_DD.div_(count - 1)


def _zca_matrices(covariance_DD: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U (S + eps)^(-1/2) U^T and U (S + eps)^(1/2) U^T. Neither depends on the signs of the eigenvectors."""
    eigenvalues_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    scale_D = (eigenvalues_D.clamp(min=0) + eps).sqrt()  # rounding can make a zero eigenvalue slightly negative
    if not float(scale_D.min()) > 0:
        raise DataError(
            f"data.zca_eps: {eps:g} cannot whiten directions without variance in the images; valid: above 0"
        )
    return (vectors_DD / scale_D) @ vectors_DD.T, (vectors_DD * scale_D) @ vectors_DD.T


def _channel_statistics(
    images_NCHW: torch.Tensor, asked_by: str = "data.whitening: standardize"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (over N, not N - 1) of each channel in [0, 1], from exact histograms.

    Raises ``DataError``, naming ``asked_by``, for a constant channel.
    """
    channels = images_NCHW.shape[1]
    step = _chunk_rows(images_NCHW[0].numel()) if len(images_NCHW) else 1
    histogram_CV = torch.zeros(channels, 256, dtype=torch.int64, device=images_NCHW.device)
    for i in range(0, len(images_NCHW), step):
        for c in range(channels):
            histogram_CV[c] += torch.bincount(images_NCHW[i : i + step, c].reshape(-1), minlength=256)
    value_V = torch.arange(256, dtype=torch.float64, device=images_NCHW.device) / 255
    count_C = histogram_CV.sum(dim=1).to(torch.float64)
    mean_C = histogram_CV.to(torch.float64) @ value_V / count_C
    variance_C = (histogram_CV * (value_V - mean_C[:, None]) ** 2).sum(dim=1) / count_C
    for c in range(channels):
        if not float(variance_C[c]) > 1e-12:  # the smallest step of a uint8 image is far larger
            raise DataError(f"{asked_by}: channel {c} is constant; valid: none, or whitening zca alone")
    return mean_C, variance_C.sqrt()
