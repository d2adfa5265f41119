"""The network of experts and students: any ``nn.Module`` that names its classifier.

Trajectories store, and students unroll, only the module's parameters. ``check`` rejects networks with any other state
that training changes, or with random draws, in a one-line error that states what is valid.

Shapes: B images of a batch, C channels, H side in pixels, D features, K classes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from lad_dist.errors import LadDistError, RecipeError, first_line
from lad_dist.models import convnet, functional, zoo
from lad_dist.models.layout import Layout, classifier_name
from lad_dist.recipe import ModelConfig
from lad_dist.seeds import torch_seeded

_FIELD = "model.network"
_TOLERANCE = 1e-3  # between an image's features alone and in a batch, relative to the largest feature
_NORMS = "a norm of each image, such as GroupNorm"


def build(
    model: ModelConfig, channels: int, size: int, classes: int, *, seed: int, purpose: tuple[int | str, ...]
) -> nn.Module:
    """Build the recipe's network; its initialisation is a pure function of ``seed`` and ``purpose``.

    Raises:
        RecipeError: there is no such network, or it is unsuitable for experts and students.
        DataError: the images are too small for it.
    """
    if model.network == "convnet":
        return convnet.build(channels, size, classes, model.width, model.depth, seed=seed, purpose=purpose)
    _check_once(model.network, channels, size, classes)
    with torch_seeded(seed, "init", *purpose):
        return zoo.make(model.network, channels, size, classes, field=_FIELD)


@functools.cache
def _check_once(name: str, channels: int, size: int, classes: int) -> None:
    """Build and check the network once per process; threads that are drawing random numbers are not affected."""
    with torch_seeded(0, "check", name):
        made = zoo.make(name, channels, size, classes, field=_FIELD)
        check(made, channels, size, classes, f"{_FIELD}: {name}")


@torch.enable_grad()
def check(module: nn.Module, channels: int, size: int, classes: int, where: str) -> None:
    """Try ``module`` on a few images.

    Raises RecipeError, prefixed by ``where``, if it is unsuitable for experts and students.
    """
    _check_parameters(module, where)
    images_BCHH = torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(0))
    try:
        _check_logits(module, images_BCHH, classes, where)
    except LadDistError:
        raise
    except Exception as error:  # any error of the network's code
        shape = f"{channels}x{size}x{size}"
        raise RecipeError(f"{where}: on images of {shape}: {type(error).__name__}: {error}") from error
    _check_derivatives(module, images_BCHH, where)


def _check_parameters(module: nn.Module, where: str) -> None:
    kept = module.state_dict()
    buffers = [name for name, _ in module.named_buffers() if name in kept]
    if buffers:
        more = f" and {len(buffers) - 1} more" if len(buffers) > 1 else ""
        raise RecipeError(
            f"{where}: has buffers ({buffers[0]}{more}), which trajectories do not store; valid: parameters alone, with {_NORMS} "
            "instead of batch norm"
        )
    frozen = [n for n, p in module.named_parameters() if not p.requires_grad or p.dtype != torch.float32]
    if frozen:
        raise RecipeError(
            f"{where}: parameter {frozen[0]} is frozen or not float32; valid: float32, all of them trained"
        )
    name = classifier_name(module)
    try:
        classifier = module.get_submodule(name)
    except AttributeError:
        classifier = None
    parameters = {n for n, _ in module.named_parameters() if n.startswith(f"{name}.")}
    if not isinstance(classifier, nn.Linear) or parameters != {f"{name}.weight", f"{name}.bias"}:
        found = "no such module" if classifier is None else f"{type(classifier).__name__} of {sorted(parameters)}"
        raise RecipeError(
            f"{where}: its classifier {name!r} is {found}; valid: an attribute classifier_name that names the last nn.Linear, "
            "which has a bias"
        )
    if len(parameters) == len(kept):
        raise RecipeError(f"{where}: has no layers before its classifier; valid: one or more")


def _check_logits(module: nn.Module, images_BCHH: Tensor, classes: int, where: str) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    handle = module.get_submodule(classifier_name(module)).register_forward_hook(
        lambda _, given, out: seen.append((given[0].detach(), out.detach()))
    )
    try:
        with torch.no_grad():
            logits_BK = module(images_BCHH)
            for again in (images_BCHH, *images_BCHH.split(1)):
                module(again)
    finally:
        handle.remove()
    if not isinstance(logits_BK, Tensor) or logits_BK.shape != (len(images_BCHH), classes):
        shape = tuple(logits_BK.shape) if isinstance(logits_BK, Tensor) else type(logits_BK).__name__
        raise RecipeError(
            f"{where}: returns {shape} for {len(images_BCHH)} images; valid: logits of shape (images, {classes})"
        )
    if len(seen) != 2 + len(images_BCHH) or seen[0][0].dim() != 2 or not torch.equal(seen[0][1], logits_BK):
        raise RecipeError(
            f"{where}: its logits are not the output of one call of {classifier_name(module)!r} on features (images, D); valid: "
            "a linear layer as the last step"
        )
    features_BD, again_BD, *alone_BD = (features for features, _ in seen)
    if not _same(features_BD, again_BD):
        raise RecipeError(f"{where}: its logits differ between calls; valid: nothing random in training, so no dropout")
    if not _same(features_BD, torch.cat(alone_BD)):
        raise RecipeError(f"{where}: an image's logits depend on the others of its batch; valid: {_NORMS}")


def _same(features_BD: Tensor, others_BD: Tensor) -> bool:
    return torch.allclose(features_BD, others_BD, rtol=0, atol=_TOLERANCE * float(features_BD.abs().max()))


def _check_derivatives(module: nn.Module, images_BCHH: Tensor, where: str) -> None:
    """Check what a student step needs: the gradient by every parameter, and its derivative by the images."""
    layout = Layout.of(module)
    weights_P = convnet.flat_parameters(module).requires_grad_()
    images_BCHH = images_BCHH.clone().requires_grad_()
    views = layout.views(weights_P)
    loss = functional.logits(module, views, images_BCHH).square().sum()
    by_name = torch.autograd.grad(loss, list(views.values()), create_graph=True, allow_unused=True)
    unused = [name for name, gradient in zip(views, by_name, strict=True) if gradient is None]
    if unused:
        raise RecipeError(f"{where}: parameter {unused[0]} does not affect the logits; valid: parameters that do")
    try:
        total = torch.stack([g.square().sum() for g in by_name if g is not None]).sum()
        total.backward()  # not grad(): an operation marked once_differentiable raises only in backward()
    except RuntimeError as error:
        reason = first_line(error)
        raise RecipeError(
            f"{where}: has no second derivative ({reason}); valid: operations that torch differentiates twice"
        ) from error
    if images_BCHH.grad is None or not bool(images_BCHH.grad.isfinite().all()):
        raise RecipeError(
            f"{where}: the second derivative of its loss is not finite; valid: operations that are smooth at 0"
        )
