"""Barlow Twins (Zbontar et al. 2021, https://arxiv.org/abs/2103.03230) in one file.

Two augmented views of every image go through the same network. Each unit of the embedding is
standardized over the batch, and C, the cross-correlation matrix of the two batches of embeddings,
is driven towards the identity. Its diagonal says that both views of an image should get the same
embedding; the rest says that no unit should repeat what another one says. No negative pairs, no
momentum encoder, no stop-gradient: the second term alone keeps the embeddings from collapsing.
After training the projector is thrown away and the backbone is kept.

    loss = sum_i (1 - C_ii)^2 + lambda * sum_{i != j} C_ij^2

    torchrun barlow_twins.py                                        # built-in data, two minutes
    torchrun barlow_twins.py --data cifar10 --recipe quick          # CIFAR-10 on a CPU
    torchrun --nproc-per-node 8 barlow_twins.py --data IMAGENET     # the paper's recipe

Loss > Views > Network > Optimizer > Data > Processes > Evaluation > Pictures > Training >
Command line
"""

import argparse
import json
import math
import os
import re
import signal
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, Subset
from torchvision import datasets, models
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import draw_bounding_boxes, save_image

# ---------------------------------------------------------------------------------------- Loss


def standardize(z: Tensor) -> Tensor:
    """(N, D) -> (N, D) with mean 0 and variance 1 in each unit: BatchNorm without parameters.

    In float32 at least, also under autocast. A unit that is constant over the batch becomes 0.
    """
    return F.batch_norm(
        z.to(torch.promote_types(z.dtype, torch.float32)), None, None, training=True
    )


def cross_correlation(z_a: Tensor, z_b: Tensor) -> Tensor:
    """Correlation of every unit of one view with every unit of the other (paper, equation 2).

    (N, D), (N, D) -> (D, D), float32, entries in [-1, 1].
    Raises ValueError unless both are matrices of one shape with at least two rows.
    """
    _check(z_a, z_b)
    with torch.autocast(z_a.device.type, enabled=False):
        return standardize(z_a).T @ standardize(z_b) / len(z_a)


def barlow_twins_loss(
    z_a: Tensor, z_b: Tensor, lambd: float = 0.0051, redundancy: str = "cross"
) -> Tensor:
    """The Barlow Twins loss (paper, equation 1) of a whole batch.

    z_a, z_b: (N, D) embeddings of the two views; row n of both belongs to image n.
    lambd: weight of the redundancy term, the paper's lambda.
    redundancy: "cross" takes the off-diagonal elements from C, "auto" from the autocorrelation of
        z_a, as the information bottleneck asks for (paper, appendix A).
    Returns a float32 scalar (float64 for float64 embeddings).
    Raises ValueError for shapes that differ, are not 2-D or have one row.
    """
    invariance, off_diagonal = loss_terms(z_a, z_b, redundancy)
    return invariance + lambd * off_diagonal


def loss_terms(z_a: Tensor, z_b: Tensor, redundancy: str = "cross") -> tuple[Tensor, Tensor]:
    """The two sums of the loss, sum_i (1 - C_ii)^2 and sum_{i != j} C_ij^2, as scalars."""
    _check(z_a, z_b)
    if redundancy not in ("cross", "auto"):
        raise ValueError(f'redundancy is "cross" or "auto", not {redundancy!r}')
    n, d = z_a.shape
    with torch.autocast(z_a.device.type, enabled=False):
        a, b = standardize(z_a), standardize(z_b)
        diagonal = (a * b).sum(0) / n
        invariance = (1 - diagonal).square().sum()
        if redundancy == "auto":
            b, diagonal = a, a.square().sum(0) / n
        if d <= n:
            c = a.T @ b / n
            off_diagonal = (c - torch.diag(diagonal)).square().sum()
        else:
            # ||A^T B||^2 = <A A^T, B B^T> (Garrido et al. 2022, arXiv 2206.02574): two N x N
            # Gram matrices give the same sum as the larger D x D matrix, which is never made.
            gram = _Gram.apply(a) * _Gram.apply(b)
            off_diagonal = gram.sum() / n**2 - diagonal.square().sum()
    return invariance, off_diagonal


class _Gram(torch.autograd.Function):
    """A A^T, whose gradient takes one product where autograd takes one for each of the factors."""

    @staticmethod
    def forward(ctx, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a @ a.T

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return (grad + grad.T) @ a


def _check(z_a: Tensor, z_b: Tensor) -> None:
    if z_a.shape != z_b.shape or z_a.ndim != 2 or len(z_a) < 2:
        shapes = f"{tuple(z_a.shape)} and {tuple(z_b.shape)}"
        raise ValueError(f"embeddings must both be (N, D) with N of 2 or more, not {shapes}")


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, z)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        # Every process computes the same loss, so each already holds the whole gradient and keeps
        # the rows of its own images. DistributedDataParallel will average over the processes
        # where a sum is due: hence the factor.
        return grad.chunk(dist.get_world_size())[dist.get_rank()] * dist.get_world_size()


def gather_batch(z: Tensor) -> Tensor:
    """Embeddings of the whole batch: (n, D) per process -> (W * n, D) on each of W processes.

    Differentiable: with the same loss on every process and DistributedDataParallel, the gradients
    of the parameters are those of one process that holds the whole batch. Every process must bring
    the same n. Without a process group, or alone in it, returns z.
    """
    return _Gather.apply(z.contiguous()) if process_count() > 1 else z


# --------------------------------------------------------------------------------------- Views
# The operations are torchvision's, but with a factor of its own for every image of the batch.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's models use


@cache
def channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """A value for each channel, (3, 1, 1). Kept, since sending a new one waits for the GPU."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def normalize(images: Tensor) -> Tensor:
    """uint8 or [0, 1] float (N, 3, H, W) -> float (N, 3, H, W), as the backbone wants them."""
    x = TF.to_dtype(images, torch.float32, scale=True)
    return TF.normalize(x, channels(MEAN, x.device), channels(STD, x.device))


def crop_boxes(n: int, height: int, width: int, scale: tuple[float, float]) -> Tensor:
    """n random boxes (n, 4): top, left, height, width in pixels, as RandomResizedCrop draws them.

    scale: share of the image's area, drawn uniformly. The aspect ratio is 3/4 to 4/3.
    """
    area = height * width * torch.empty(n, 10).uniform_(*scale)
    ratio = torch.empty(n, 10).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    # The first of ten draws that fits into the image, or else as much of the image as may be.
    h = F.pad(h, (0, 1), value=min(height, round(width * 4 / 3)))
    w = F.pad(w, (0, 1), value=min(width, round(height * 4 / 3)))
    fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
    first = fits.int().argmax(1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)
    top, left = (torch.rand(n, 1) * (height - h + 1)), (torch.rand(n, 1) * (width - w + 1))
    return torch.cat([top.floor(), left.floor(), h, w], dim=1)


def resize_weights(start: Tensor, length: Tensor, size: int, total: int) -> Tensor:
    """Antialiased bicubic interpolation of a stretch of pixels as a matrix.

    start, length: (n, 1, 1), the stretch within `total` pixels; a negative length runs backwards,
    which flips the image. -> (n, size, total), rows sum to 1.
    """
    scale = length / size
    centre = start + (torch.arange(size, device=start.device).view(-1, 1) + 0.5) * scale
    pixel = torch.arange(total, device=start.device) + 0.5
    t = ((pixel - centre) / scale.abs().clamp(min=1)).abs_()
    # The cubic kernel with a = -1/2, times 2, in two pieces that end softly at 2 and at 1.
    far = (2 - t).relu_()
    inner = far - 1
    near = inner.relu()
    weights = torch.addcmul(far.square_() * inner, near.square(), 2 - 4 * near)
    weights *= (pixel - start - length / 2).abs() < length.abs() / 2
    return weights / weights.sum(-1, keepdim=True)


def resized_crop(images: Tensor, boxes: Tensor, flip: Tensor, size: int) -> Tensor:
    """uint8 (N, 3, H, W), boxes (N, 4), bool (N,) -> float (N, 3, size, size) in [0, 1]."""
    n, c, height, width = images.shape
    top, left, h, w = boxes.view(n, 4, 1, 1).unbind(1)
    backwards = flip.view(n, 1, 1).float()
    rows = resize_weights(top, h, size, height)
    columns = resize_weights(left + w * backwards, w - 2 * w * backwards, size, width)
    x = images.reshape(n, c * height, width).float() @ (columns / 255).mT
    return (rows.unsqueeze(1) @ x.view(n, c, height, size)).clamp_(0, 1)


def blend(x: Tensor, to_mean: Tensor, to_gray: Tensor, factor: Tensor) -> Tensor:
    """Adjusts the brightness, the contrast (to_mean = 1) or the saturation (to_gray = 1).

    x (N, 3, H, W) in [0, 1], the others (N, 1, 1, 1). torchvision's three functions mix an image
    with black, with its mean gray and with its own gray, so one operation does for all images.
    """
    gray = TF.rgb_to_grayscale(x)
    other = (gray * to_gray).add_(gray.mean((1, 2, 3), keepdim=True) * to_mean)
    return torch.lerp(other, x, factor).clamp_(0, 1)


def adjust_hue(x: Tensor, factor: Tensor) -> Tensor:
    """Turns the hue of x (N, 3, H, W) by `factor` (N, 1, 1, 1) of the colour circle, in HSV."""
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    # In sixths of the circle red lies at 0, green at 2, blue at 4. (eq_ leaves weights of 0 and 1,
    # with which lerp chooses as `where` does, but faster on a CPU.)
    hue = torch.lerp(4 * chroma + r - g, 2 * chroma + b - r, value.clone().eq_(g))
    hue = torch.lerp(hue, g - b, value.clone().eq_(r)) / chroma.clamp(min=1e-12) + 6 * factor
    # A channel has the full value where the hue is within 1 of its own, and falls to
    # value - chroma at a distance of 2.
    distance = hue - channels((0.0, 2.0, 4.0), x.device)
    distance.sub_((distance / 6).round_(), alpha=6).abs_()
    return torch.addcmul(value, chroma, distance.sub_(1).clamp_(0, 1), value=-1)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """(N, 3, H, W), sigma (N,) in pixels; kernel of 23 pixels (BYOL, arXiv 2006.07733, app. B)."""
    n, c, height, width = x.shape
    radius = min(11, height - 1, width - 1)
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (taps / sigma.view(n, 1)).square(), dim=1)
    kernel = kernel.repeat_interleave(c, dim=0).view(n * c, 1, 1, -1)
    x = F.pad(x, [radius] * 4, mode="reflect").view(1, n * c, height + 2 * radius, -1)
    x = F.conv2d(F.conv2d(x, kernel, groups=n * c), kernel.mT, groups=n * c)
    return x.view(n, c, height, width)


def send(x: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, on the device, without waiting for it."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def colour_jitter(x: Tensor) -> Tensor:
    """Changes brightness, contrast, saturation and hue of (N, 3, H, W) in [0, 1].

    Each image by factors and in an order of its own: v2.ColorJitter(0.4, 0.4, 0.2, 0.1).
    """
    n = len(x)

    def each(values: Tensor) -> Tensor:  # (3, n): for three operations, a value for each image
        return send(values.float().view(3, n, 1, 1, 1), x.device)

    order = torch.rand(3, n).argsort(0)  # of brightness (0), contrast (1) and saturation (2)
    to_mean, to_gray = each(order == 1), each(order == 2)
    reach = torch.tensor([0.4, 0.4, 0.2])[order]
    factors = 1 + reach * (2 * torch.rand(3, n) - 1)
    early = torch.arange(3).view(3, 1) < torch.randint(4, (n,))  # those that come before the hue
    hue = send(0.1 * (2 * torch.rand(n, 1, 1, 1) - 1), x.device)

    def blends(x: Tensor, mask: Tensor) -> Tensor:
        chosen = factors.where(mask, 1.0)  # a factor of 1 changes nothing
        for turn in zip(to_mean, to_gray, each(chosen), strict=True):
            x = blend(x, *turn)
        return x

    return blends(adjust_hue(blends(x, early), hue), ~early)


class Augment(nn.Module):
    """One of the two augmentation distributions (paper, section 2.2; BYOL, appendix B).

    uint8 (N, 3, H, W) -> normalized float (N, 3, size, size). Crop, flip, colour jitter, grayscale,
    blur and solarization are drawn for every image by itself.

    size: side of the view in pixels.
    scale: share of the image's area that a crop covers.
    blur, solarize: probabilities.
    crop=False at the call leaves out the crop, for images that are random crops already.
    """

    def __init__(self, size: int, scale=(0.08, 1.0), blur: float = 0.0, solarize: float = 0.0):
        super().__init__()
        self.size, self.scale, self.blur, self.solarize = size, scale, blur, solarize

    def forward(self, images: Tensor, crop: bool = True) -> Tensor:
        n, _, height, width = images.shape
        device = images.device

        # All is drawn on the CPU: a seed gives the same views on every device, and the device
        # need not be asked which images were chosen.
        def chosen(mask: Tensor) -> Tensor:
            return send(mask.nonzero().squeeze(1), device)

        flip = torch.rand(n) < 0.5
        if crop:
            boxes = crop_boxes(n, height, width, self.scale)
            x = resized_crop(images, send(boxes, device), send(flip, device), self.size)
        else:
            x = TF.to_dtype(images, torch.float32, scale=True)
            i = chosen(flip)
            x[i] = x[i].flip(3)
        i = chosen(torch.rand(n) < 0.8)
        x[i] = colour_jitter(x.index_select(0, i))
        i = chosen(torch.rand(n) < 0.2)
        x[i] = TF.rgb_to_grayscale(x[i], num_output_channels=3)
        mask, sigma = torch.rand(n) < self.blur, torch.empty(n).uniform_(0.1, 2.0)
        if mask.any():
            i = chosen(mask)
            x[i] = gaussian_blur(x[i], send(sigma[mask], device))
        i = chosen(torch.rand(n) < self.solarize)
        x[i] = TF.solarize(x[i], threshold=0.5)
        return normalize(x)


def two_views(images: Tensor, augment_a: Augment, augment_b: Augment) -> tuple[Tensor, Tensor]:
    """The views of a batch, one from T and one from T': two float (N, 3, size, size).

    images: uint8 (N, 3, H, W), or (N, 2, 3, H, W) if two crops were made of each image already.
    """
    cropped = images.ndim == 5
    a, b = images.unbind(1) if cropped else (images, images)
    return augment_a(a, crop=not cropped), augment_b(b, crop=not cropped)


# ------------------------------------------------------------------------------------- Network

RESNETS = models.list_models(models, include=["resnet*", "resnext*", "wide_resnet*"])


class GlobalAveragePool(nn.Module):
    """(N, d, H, W) -> (N, d), as nn.AdaptiveAvgPool2d, but its gradient stays channels_last.

    That of nn.AdaptiveAvgPool2d has to be laid out anew for the layers before it.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1).mean((1, 2))


def make_backbone(arch: str, small_images: bool) -> tuple[nn.Module, int]:
    """The backbone without a classifier, (N, 3, H, W) -> (N, d), and d."""
    if arch == "small":
        layers = []
        for c_in, c_out, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2), (128, 256, 1)):
            layers += [nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
        return nn.Sequential(*layers, GlobalAveragePool()), 256
    if arch not in RESNETS:
        raise ValueError(f"arch is one of small, {', '.join(RESNETS)}, not {arch!r}")
    backbone = models.get_model(arch, zero_init_residual=True)
    d, backbone.fc = backbone.fc.in_features, nn.Identity()
    if small_images:
        backbone.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    return backbone, d


class BarlowTwins(nn.Module):
    """Backbone and projector (paper, section 2.2).

    arch: the name of a torchvision ResNet, or "small", four convolutions for CPUs.
    projector: widths of its layers, such as "8192-8192-8192"; the last one is D.
    small_images: 3x3 stem without max-pool, for images of about 32 pixels (SimCLR, arXiv
        2002.05709, appendix B.9).
    forward: (N, 3, H, W) -> embeddings z (N, D). `backbone` gives the representations (N, d) that
    are kept after training, `projector` maps (N, d) to (N, D).
    Raises ValueError for an unknown arch or projector.
    """

    def __init__(self, arch="resnet18", projector="2048-2048-2048", small_images=True):
        super().__init__()
        if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)*", projector):
            raise ValueError(f'projector is made of widths like "512-512-512", not {projector!r}')
        self.backbone, d = make_backbone(arch, small_images)
        *hidden, last = map(int, projector.split("-"))
        layers = []
        for width in hidden:
            layers += [
                nn.Linear(d, width, bias=False),
                nn.BatchNorm1d(width),
                nn.ReLU(inplace=True),
            ]
            d = width
        self.projector = nn.Sequential(*layers, nn.Linear(d, last, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(self.backbone(x))


# ----------------------------------------------------------------------------------- Optimizer


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose step has, for each layer, a length in proportion to its weights.

    (You et al. 2017, arXiv 1708.03888; paper, section 2.2.) For a tensor w of two or more
    dimensions with gradient g:

        g <- g + weight_decay * w
        m <- momentum * m + g * eta * |w| / |g|
        w <- w - lr * m

    Vectors (biases, BatchNorm) get neither the decay nor the factor, and the factor is 1 where
    either norm is 0.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.001):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eta": eta}
        )

    @torch.no_grad()
    def step(self, closure=None):
        loss = closure and torch.enable_grad()(closure)()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                g = w.grad
                if w.ndim > 1:
                    g = g.add(w, alpha=group["weight_decay"])
                    ratio = group["eta"] * w.norm() / g.norm()
                    g = g * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
                if "momentum" not in self.state[w]:
                    self.state[w]["momentum"] = torch.zeros_like(w)
                m = self.state[w]["momentum"].mul_(group["momentum"]).add_(g)
                w.add_(m, alpha=-group["lr"])
        return loss


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Share of the full rate at a step: linear from 0 over `warmup` steps, then half a cosine
    from 1 to 0.001 at the last of `steps` steps (paper, section 2.2)."""
    if step < warmup:
        return step / warmup
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))
    return cosine + 0.001 * (1 - cosine)


# ---------------------------------------------------------------------------------------- Data


def _box(u: Tensor, v: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


# Each shape as a function of the plane that is negative inside; the shapes fill about [-1, 1]^2.
SHAPES = {
    "disk": lambda u, v: torch.hypot(u, v) - 0.85,
    "ring": lambda u, v: (torch.hypot(u, v) - 0.7).abs() - 0.2,
    "square": lambda u, v: _box(u, v, 0.75, 0.75),
    "frame": lambda u, v: _box(u, v, 0.65, 0.65).abs() - 0.18,
    "triangle": lambda u, v: torch.maximum(v - 0.7, 0.87 * u.abs() - 0.5 * v - 0.43),
    "plus": lambda u, v: torch.minimum(_box(u, v, 0.9, 0.27), _box(u, v, 0.27, 0.9)),
    "star": lambda u, v: torch.hypot(u, v) - 0.62 - 0.33 * torch.cos(5 * torch.atan2(u, -v)),
    "crescent": lambda u, v: torch.maximum(
        torch.hypot(u, v) - 0.9, 0.75 - torch.hypot(u - 0.45, v)
    ),
    "bars": lambda u, v: _box(u.abs() - 0.55, v, 0.25, 0.9),
    "hourglass": lambda u, v: torch.maximum(v.abs() - 0.85, u.abs() - v.abs()),
}


def shapes(n: int, seed: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """n images of the ten SHAPES, drawn anew from the seed.

    Place, size, turn, brightness and tint vary, and pixels are noisy, so that pixels tell little
    about the class. -> uint8 (n, 3, size, size), int64 labels (n,).
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(len(labels), *shape, generator=generator)

    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    all_labels = torch.randint(len(SHAPES), (n,), generator=generator)
    images = []
    for labels in all_labels.split(250):  # bounds the memory
        x, y = axis - uniform(-0.5, 0.5, 1, 1), axis.view(-1, 1) - uniform(-0.5, 0.5, 1, 1)
        radius, turn = uniform(0.4, 0.8, 1, 1), uniform(-0.16, 0.16, 1, 1)
        u = (x * turn.cos() + y * turn.sin()) / radius
        v = (y * turn.cos() - x * turn.sin()) / radius
        distance = torch.empty_like(u)
        for label, outline in enumerate(SHAPES.values()):
            i = labels == label
            distance[i] = outline(u[i], v[i])
        inside = (0.5 - distance * radius * size / 2).clamp(0, 1).unsqueeze(1)  # soft edge
        dark = uniform(0.1, 0.4, 1, 1, 1)
        bright = dark + uniform(0.3, 0.5, 1, 1, 1)
        dark, bright = (c + uniform(-0.03, 0.03, 3, 1, 1) for c in (dark, bright))
        inside = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, inside, 1 - inside)
        image = torch.lerp(dark, bright, inside)
        image += 0.04 * torch.randn(image.shape, generator=generator)
        images.append((image * 255).clamp(0, 255).byte())
    return torch.cat(images), all_labels


class Failure(Exception):
    """One sentence for the user: what is wrong and what to do; `main` prints it and exits."""


class Folder(datasets.ImageFolder):
    """Images in CLASS/ folders, of any size and mode.

    Item: the centre as uint8 (3, size, size), or, with a crop `scale`, two random crops as uint8
    (2, 3, size, size), which depend on the seed, the epoch and the index alone.
    """

    def __init__(self, root: Path, size: int, margin: float, scale=None, seed: int = 0):
        try:
            super().__init__(root, allow_empty=True)
        except OSError as error:
            raise Failure(f"{root} must hold a folder of images for each class: {error}") from None
        if not self.samples:
            raise Failure(
                f"{root} holds no images in CLASS/ folders ({', '.join(self.extensions)})"
            )
        self.size, self.margin, self.seed, self.epoch = size, margin, seed, 0
        bicubic = InterpolationMode.BICUBIC
        self.crop = scale and v2.RandomResizedCrop(size, scale, interpolation=bicubic)

    def __getitem__(self, index: int) -> Tensor:
        image = read_image(self.samples[index][0])
        if not self.crop:
            # For a margin of 1/16 this is the usual "resize to 256, take the central 224".
            square = ImageOps.fit(image, (self.size,) * 2, Image.Resampling.BICUBIC, self.margin)
            return TF.pil_to_tensor(square)
        torch.manual_seed(hash((self.seed, self.epoch, index)))
        return torch.stack([TF.pil_to_tensor(self.crop(image)) for _ in range(2)])


def read_image(path: str) -> Image.Image:
    """The RGB image in a file. Raises Failure with the path if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits, which convert() would clip to white
                image = image.point(lambda value: value / 256).convert("L")
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise Failure(f"cannot read the image {path}: {error}") from None


class Data(NamedTuple):
    """Images are uint8 (n, 3, H, W) tensors, or data sets of files that yield uint8 (3, H, W)."""

    classes: list[str]
    unlabelled: Tensor | torch.utils.data.Dataset  # to train on; files yield (2, 3, H, W)
    train: Tensor | torch.utils.data.Dataset  # the labelled ones that the judges learn from
    train_y: Tensor  # int64
    val: Tensor | torch.utils.data.Dataset
    val_y: Tensor


MAX_LABELS = 50_000  # for the judges during training: CIFAR-10's all, ImageNet's 50 for each class


def load_data(args) -> Data:
    """The images of args.data: "shapes", "cifar10" (below args.data_dir) or a folder.

    Raises Failure if they are not there or not as expected.
    """
    size, cpu = args.size, torch.device("cpu")
    if args.data == "shapes":
        (train, train_y), (val, val_y) = shapes(20_000, 1, size), shapes(5_000, 2, size)
        return Data(list(SHAPES), train, train[:1000], train_y[:1000], val, val_y)
    if args.data == "cifar10":
        try:
            parts = [
                datasets.CIFAR10(args.data_dir, train, download=True) for train in (True, False)
            ]
        except (OSError, RuntimeError) as error:
            raise Failure(
                f"cannot get CIFAR-10 ({error}): put cifar-10-python.tar.gz into {args.data_dir} "
                "by hand, or use --data shapes, which needs no download"
            ) from None
        classes = parts[0].classes
        (train, val) = (torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in parts)
        (train_y, val_y) = (torch.tensor(part.targets) for part in parts)
        return Data(classes, train, train, train_y, val, val_y)

    for part in ("train", "val"):
        if not Path(args.data, part).is_dir():
            raise Failure(
                f"--data {args.data} must be shapes, cifar10 or a folder with train/CLASS/* and "
                f"val/CLASS/* in it; there is no folder {Path(args.data, part)}"
            )
    margin = 0 if args.in_memory else 1 / 16
    train, val = (Folder(Path(args.data, part), size, margin) for part in ("train", "val"))
    if unknown := set(val.classes) - set(train.classes):
        raise Failure(
            f"{val.root} has classes that {train.root} lacks: {', '.join(sorted(unknown))}"
        )
    classes, train_y = train.classes, torch.tensor(train.targets)
    val_y = torch.tensor([train.class_to_idx[val.classes[target]] for target in val.targets])
    # On disk they lie class by class, and the judges take the first so many.
    most = len(train_y) if args.evaluate else MAX_LABELS
    mixed, mixed_val = (
        torch.randperm(len(y), generator=torch.Generator().manual_seed(0))[:most]
        for y in (train_y, val_y)
    )
    if args.in_memory:
        unlabelled, val = (
            torch.cat(list(batches(x, torch.arange(len(x)).split(100), cpu, args.workers)))
            for x in (train, val)
        )
        train, val = unlabelled[mixed], val[mixed_val]
    else:
        unlabelled = Folder(Path(train.root), size, margin, (args.crop_scale, 1.0), args.seed)
        train, val = Subset(train, mixed.tolist()), Subset(val, mixed_val.tolist())
    return Data(classes, unlabelled, train, train_y[mixed], val, val_y[mixed_val])


def batches(images, order, device, workers: int):
    """The images of each tensor of indices in `order`, uint8 (n, ..., 3, H, W), on the device."""
    if isinstance(images, Tensor):
        for i in order:
            yield images.index_select(0, i.to(images.device, non_blocking=True)).to(device)
    else:
        loader = DataLoader(
            images,
            batch_sampler=[i.tolist() for i in order],
            num_workers=workers,
            pin_memory=device.type == "cuda",
        )
        yield from (batch.to(device, non_blocking=True) for batch in loader)


# ----------------------------------------------------------------------------------- Processes


def process_count() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    return dist.get_rank() if process_count() > 1 else 0


def start_processes() -> torch.device:
    """Joins the processes that torchrun started, if any; the device of this one."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda and local_rank >= torch.cuda.device_count():
        raise Failure(
            f"process {local_rank} of this machine has no GPU: lower --nproc-per-node to "
            f"{torch.cuda.device_count()}"
        )
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return device


def agree(code: int) -> int:
    """The largest of the processes' numbers, on all of them."""
    if process_count() > 1:
        code = torch.tensor(code)
        dist.all_reduce(code, dist.ReduceOp.MAX)
    return int(code)


@contextmanager
def together():
    """A Failure within it, on any process, is raised on all: none waits for one that is gone."""
    error = None
    try:
        yield
    except Failure as failure:
        error = failure
    errors = [error] * process_count()
    # One number tells whether there is anything to exchange: this runs in every training step.
    if process_count() > 1 and agree(int(error is not None)):
        dist.all_gather_object(errors, error)
    for error in filter(None, errors):
        raise error


def on_first(function, *args):
    """Calls the function on process 0 alone; all of them get its result, or its Failure."""
    result = [None]
    with together():
        if process_rank() == 0:
            result = [function(*args)]
    if process_count() > 1:
        dist.broadcast_object_list(result, device=torch.device("cpu"))
    return result[0]


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if process_rank() == 0:
        print(text, flush=True)


# ---------------------------------------------------------------------------------- Evaluation


@torch.no_grad()
def extract_features(backbone: nn.Module, images, device, workers=0, most=None) -> Tensor:
    """Representations (n, d) of the first `most` images in evaluation mode, on every process.

    images: uint8 (n, 3, H, W) or a data set that yields uint8 (3, H, W). Each of the processes
    computes its share.
    """
    n = min(len(images), most or len(images))
    share = math.ceil(n / process_count())
    own = (torch.arange(share) + share * process_rank()) % n  # equal shares, if need be some twice
    training, features = backbone.training, None
    backbone.eval()
    with together():
        places = torch.arange(share).split(500)
        shares = batches(images, own.split(500), device, workers)
        for place, batch in zip(places, shares, strict=True):
            x = backbone(normalize(batch).contiguous(memory_format=torch.channels_last))
            features = x.new_empty(share, x.shape[1]) if features is None else features
            features[place] = x
    backbone.train(training)
    return gather_batch(features)[:n]


def features_of(backbone, data: Data, device, workers=0, most=None) -> tuple[Tensor, ...]:
    """Of the first `most` labelled training images, (n, d), with their classes, (n,), and of the
    first validation images, (m, d), with theirs, (m,)."""
    x, val_x = (
        extract_features(backbone, images, device, workers, most)
        for images in (data.train, data.val)
    )
    return x, data.train_y[: len(x)].to(device), val_x, data.val_y[: len(val_x)].to(device)


def accuracy(scores: Tensor, y: Tensor, top: int = 1) -> float:
    """Share of the rows of (M, classes) with the class y (M,) among the highest `top`."""
    return float((scores.topk(top).indices == y[:, None]).any(1).float().mean())


def knn_votes(train_x, train_y, test_x, k: int = 200, temperature: float = 0.1) -> Tensor:
    """Votes (M, classes) of the k nearest training images, by exp(cosine similarity / temperature).

    (Wu et al. 2018, arXiv 1805.01978.) Features (N, d) with classes (N,), and features (M, d).
    """
    norm = train_x.norm(dim=1).clamp(min=1e-12)
    votes = test_x.new_zeros(len(test_x), int(train_y.max()) + 1)
    rows = max(1, 50_000_000 // len(train_x))  # bounds the memory of the similarities
    for x, votes_of_x in zip(test_x.split(rows), votes.split(rows), strict=True):
        similarity = F.normalize(x) @ train_x.T / norm
        similarity, nearest = similarity.topk(min(k, len(train_x)))
        votes_of_x.scatter_add_(1, train_y[nearest], (similarity / temperature).exp())
    return votes


def knn_accuracy(train_x, train_y, test_x, test_y, k: int = 200, temperature: float = 0.1) -> float:
    """Share of the test images (M, d) whose class (M,) gets most of the `knn_votes`."""
    return accuracy(knn_votes(train_x, train_y, test_x, k, temperature), test_y)


def linear_logits(train_x, train_y, test_x) -> Tensor:
    """Logits (M, classes) of a linear classifier of features: the linear probe.

    Logistic regression by L-BFGS on features of mean 0 and mean variance 1. The L2 penalty is the
    one with the least cross-entropy on a fifth of the training images that is held out for the
    purpose. Features (N, d) with classes (N,), and features (M, d).
    """
    mean, scale = train_x.mean(0), train_x.std(0).square().mean().sqrt().clamp(min=1e-12)
    weight = train_x.new_zeros(int(train_y.max()) + 1, train_x.shape[1], requires_grad=True)
    bias = train_x.new_zeros(len(weight), requires_grad=True)
    rows = max(1, 50_000_000 // len(weight))  # bounds the memory of the logits

    def logits(x):  # shifts and scales the weights rather than the features, which may be many
        return F.linear(x, weight / scale, bias - weight @ mean / scale)

    def fit(share, penalty, steps):
        """Minimizes the mean cross-entropy over the images whose share is 1, not 0."""
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=steps, tolerance_change=1e-5, line_search_fn="strong_wolfe"
        )

        def closure():
            optimizer.zero_grad()
            loss = penalty / 2 * weight.square().sum()
            loss.backward()
            for x, y, w in zip(*(t.split(rows) for t in (train_x, train_y, share)), strict=True):
                part = F.cross_entropy(logits(x), y, reduction="none") @ w / share.sum()
                part.backward()
                loss = loss + part
            return loss.detach()

        optimizer.step(closure)

    draw = torch.rand(len(train_x), generator=torch.Generator().manual_seed(0)).to(train_x.device)
    held_out, least, best = draw < 0.2, math.inf, 0.0
    for penalty in torch.logspace(0, -5, 11).tolist():  # each fit starts where the last one ended
        fit((~held_out).float(), penalty, steps=30)
        with torch.no_grad():
            loss = float(F.cross_entropy(logits(train_x[held_out]), train_y[held_out]))
        if loss > least:
            break
        least, best = loss, penalty
    fit(torch.ones_like(draw), best, steps=100)
    return logits(test_x).detach()


def linear_accuracy(train_x, train_y, test_x, test_y) -> float:
    """Share of the test images (M, d) whose class (M,) has the highest of the `linear_logits`."""
    return accuracy(linear_logits(train_x, train_y, test_x), test_y)


def effective_rank(x: Tensor) -> float:
    """How many dimensions the features (N, d) fill: RankMe (Garrido et al. 2023, 2210.02885)."""
    x = x.double()
    singular_values = torch.linalg.eigvalsh(x.T @ x).clamp(min=0).sqrt()
    p = singular_values / singular_values.sum() + 1e-7
    return float((-p * p.log()).sum().exp())


def collapse(x: Tensor, rank: float) -> str:
    """A warning if features (N, d) of this effective rank are collapsing; else ""."""
    dead = float((x.std(0) < 1e-4).float().mean())
    if rank >= 5 and dead <= 0.5:
        return ""
    return (
        f"warning: the representation is collapsing: it fills {rank:.1f} of {x.shape[1]} "
        f"dimensions and {dead:.0%} of its units are dead; try lower --lr-weights, larger --lambd "
        "or a larger --batch-size"
    )


def judge_knn(train_x, train_y, val_x, val_y) -> float:
    """kNN accuracy with k = 200, or a fiftieth of the labels if that is less."""
    return knn_accuracy(train_x, train_y, val_x, val_y, max(1, min(200, len(train_x) // 50)))


def judge(*features: Tensor) -> dict:
    """Both accuracies, of training features and labels, validation features and labels."""
    return {"knn": judge_knn(*features), "linear": linear_accuracy(*features)}


# ------------------------------------------------------------------------------------ Pictures


def save_grid(path: Path, images: list[Tensor], columns: int) -> None:
    """Writes images, uint8 (3, H, W), as a PNG with so many columns."""
    try:
        save_image(torch.stack(images) / 255, path, nrow=columns, pad_value=1.0)
    except OSError as error:
        raise Failure(f"cannot write {path} ({error})") from None


def draw_views(path: Path, images: Tensor, augments: tuple[Augment, Augment]) -> None:
    """Images, uint8 (n, 3, H, W), each followed by four draws of T and four of T'."""
    std, mean = channels(STD, images.device), channels(MEAN, images.device)
    views = [augment(images) * std + mean for augment in augments for _ in range(4)]
    side = max(64, augments[0].size)
    columns = [images, *(view * 255 for view in views)]
    columns = [TF.resize(x.float(), [side, side], InterpolationMode.NEAREST) for x in columns]
    save_grid(path, list(torch.stack(columns, dim=1).flatten(0, 1)), len(columns))


def shrink(c: Tensor) -> Tensor:
    """(D, D) -> at most (256, 256) by averaging, the diagonal by itself lest it fade."""
    side, diagonal = min(256, len(c)), c.diagonal()
    blocks = F.adaptive_avg_pool2d((c - torch.diag(diagonal))[None], side)[0]
    return blocks + torch.diag(F.adaptive_avg_pool1d(diagonal[None], side)[0])


def correlation(model: nn.Module, images, augments, args) -> Tensor:
    """C of the first 512 images in evaluation mode, shrunk, on the CPU."""
    first, device = torch.arange(min(len(images), 512)), next(model.parameters()).device
    views = two_views(next(batches(images, [first], device, args.workers)), *augments)
    with torch.no_grad():
        z_a, z_b = (model.eval()(view) for view in views)
    model.train()
    return shrink(cross_correlation(z_a / z_a.std(), z_b / z_b.std())).cpu()  # untrained z is tiny


def draw_correlation(path: Path, before: Tensor, now: Tensor) -> None:
    """C, (D, D), before training and now: blue is -1, white 0, red 1."""
    pictures = [[1 - (-c).relu(), 1 - c.abs(), 1 - c.relu()] for c in (before, now)]
    save_grid(path, [torch.stack(rgb).clamp(0, 1) * 255 for rgb in pictures], columns=2)


def nearest(x: Tensor, y: Tensor, val_x: Tensor, val_y: Tensor) -> Tensor:
    """The 5 training images nearest to each of 10 validation images, as indices (10, 5)."""
    return (F.normalize(val_x[:10]) @ F.normalize(x).T).topk(min(5, len(x))).indices.cpu()


def draw_neighbours(path: Path, data: Data, untrained: Tensor, trained: Tensor) -> None:
    """Validation images between their neighbours for the untrained and the trained backbone.

    untrained, trained: (10, 5). A neighbour of the same class has a green frame, another a red one.
    """
    cells = []

    def add(image: Tensor, colour: str) -> None:
        image = TF.resize(image.cpu(), [64, 64], InterpolationMode.NEAREST)
        cells.append(
            draw_bounding_boxes(image, torch.tensor([[0, 0, 63, 63]]), None, colour, width=3)
        )

    for i, (left, right) in enumerate(zip(untrained.tolist(), trained.tolist(), strict=True)):
        colours = ["lime" if c == data.val_y[i] else "red" for c in data.train_y[left + right]]
        neighbours = [data.train[j] for j in left + right]
        for j, (image, colour) in enumerate(zip(neighbours, colours, strict=True)):
            if j == len(left):
                add(data.val[i], "white")
            add(image, colour)
    save_grid(path, cells, columns=2 * untrained.shape[1] + 1)


# ------------------------------------------------------------------------------------ Training

# Fused, since otherwise every step of AdamW makes temporaries as large as all the parameters.
OPTIMIZERS = {"lars": LARS, "adamw": partial(torch.optim.AdamW, fused=True)}
# What a run shares with the checkpoint that it continues, beside its data; all else may change.
FIXED = "recipe", "size", "arch", "projector", "optimizer", "weight_decay", "batch_size", "seed"


def make_optimizer(model: nn.Module, args) -> torch.optim.Optimizer:
    """Weights first, then vectors (biases, BatchNorm), which get no decay."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": args.weight_decay}, {"params": vectors}]
    return OPTIMIZERS[args.optimizer](groups, lr=0.0, weight_decay=0.0)


def make_augments(args) -> tuple[Augment, Augment]:
    """T and T'."""
    odds = zip(args.blur, args.solarize, strict=True)
    return tuple(Augment(args.size, (args.crop_scale, 1.0), *p) for p in odds)


def build(args, device: torch.device) -> tuple:
    """The seeded model on the device, its optimizer, and T and T'."""
    torch.manual_seed(args.seed)
    model = BarlowTwins(args.arch, args.projector, args.small_images)
    model.to(device, memory_format=torch.channels_last)
    return model, make_optimizer(model, args), make_augments(args)


def distribute(model: nn.Module, args, device: torch.device) -> nn.Module:
    """The model as the processes train it together; its parameters stay where they are."""
    if process_count() > 1 and device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif process_count() > 1:
        say("on CPUs BatchNorm sees each process's own images only (on GPUs it is synchronized)")
    if args.compile:
        model.compile()
    if process_count() == 1:
        return model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch 2.15 renames broadcast_buffers
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def training_step(model, optimizer, views, args, terms=loss_terms, mark=str) -> Tensor:
    """One step on two views (n, 3, H, W) of this process's images. -> the loss's two terms, (2,).

    `mark` is called with the name of each part of the step when it is done.
    """
    with torch.autocast(views[0].device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        z_a, z_b = (model(view) for view in views)
    mark("forward")
    z_a, z_b = gather_batch(z_a.float()), gather_batch(z_b.float())
    invariance, off_diagonal = terms(z_a, z_b, args.redundancy)
    mark("loss")
    optimizer.zero_grad()
    (invariance + args.lambd * off_diagonal).backward()
    mark("backward")
    optimizer.step()
    mark("optimizer")
    return torch.stack([invariance, off_diagonal]).detach()


def batches_of_epoch(images, epoch: int, first: int, args, device: torch.device):
    """This process's images for each step of an epoch from step `first` on."""
    n, world = len(images), process_count()
    # The order depends on the seed and the epoch, however many processes share it.
    sampler = DistributedSampler(range(n), world, process_rank(), seed=args.seed, drop_last=True)
    sampler.set_epoch(epoch)
    order = torch.tensor(list(sampler)).split(args.batch_size // world)
    if not isinstance(images, Tensor):
        images.epoch = epoch
    return batches(images, order[first : n // args.batch_size], device, args.workers)


def save_whole(state: dict, path: Path) -> None:
    """Writes beside the old file and renames, so that at any moment there is a whole one."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch has its own words for a full disk
        with suppress(OSError):
            part.unlink()
        reason = error if isinstance(error, OSError) else "is the disk full?"
        raise Failure(f"cannot write {path} ({reason}); what was there before is whole") from None


def load_weights(path: Path) -> dict:
    """The dict in a file of torch.save; code in it is not run. Raises Failure if there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # damaged files make torch suspect this and that
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except OSError as error:
        raise Failure(f"cannot read {path} ({error})") from None
    except Exception:  # damaged files raise many kinds
        raise Failure(f"{path} is damaged or holds no weights") from None


def load_checkpoint(path: Path, settings: dict) -> dict | None:
    """What `train` saved, or None if there is nothing. Raises Failure if it is of no use."""
    if not path.exists():
        return None
    try:
        state = load_weights(path)
        before = state.get("settings", {})
        for key, value in settings.items():
            if key not in before:
                raise Failure(f"{path} is no checkpoint of this program")
            if before[key] != value:
                raise Failure(f"{path} was trained with {key} {before[key]}, not {value}")
    except Failure as failure:
        hint = "it was not overwritten: move it away or name another folder with --out"
        raise Failure(f"{failure}; {hint}") from None
    return state


@contextmanager
def signals_caught():
    """A list to which SIGINT and SIGTERM are appended instead of taking effect at once."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda n, frame: caught.append(n)) for number in numbers]
    try:
        yield caught
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)


def log(out: Path, event: str, values: dict) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "log.jsonl", "a") as file:
            file.write(json.dumps({"event": event, **values}) + "\n")
    except OSError as error:
        raise Failure(f"cannot write to the folder {out} ({error}): see --out") from None


def open_data(args, device: torch.device) -> Data:
    """The data, read by process 0; small images move to the device."""
    data = on_first(load_data, args)
    if isinstance(data.unlabelled, Tensor):
        data = Data(data.classes, *(x.to(device) for x in data[1:]))
    say(
        f"{args.data}: {len(data.unlabelled):,} images to train on, {len(data.train_y):,} labels "
        f"to judge with, {len(data.val_y):,} validation images, {len(data.classes)} classes"
    )
    return data


def train(args, device: torch.device) -> dict:
    """Trains, judges and writes to the folder args.out; returns the result that it logs last.

    Raises Failure for whatever keeps it from going on, and SystemExit after SIGINT or SIGTERM.
    """
    began, world, out = time.monotonic(), process_count(), Path(args.out)

    # What there is to train.
    data = open_data(args, device)
    n = len(data.unlabelled)
    if args.batch_size % world or not 2 * world <= args.batch_size <= n:
        raise Failure(
            f"the batch size, {args.batch_size}, must be a multiple of the number of processes "
            f"({world}), at least 2 for each, and at most the number of images ({n})"
        )
    model, optimizer, augments = build(args, device)
    say(
        f"network {args.arch} with projector {args.projector}, batches of {args.batch_size}, "
        f"{world} process{'es' * (world > 1)} on {device.type} in {args.precision}, output in {out}"
    )

    # Where it stands: at the beginning, or where the checkpoint says.
    settings = {"data": Path(args.data).resolve().name, "images": n}
    settings |= {key: getattr(args, key) for key in FIXED}
    state = on_first(load_checkpoint, out / "checkpoint.pt", settings)
    on_first(log, out, "config", vars(args) | {"processes": world, "torch": torch.__version__})
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        say(f"going on after {state['epoch']} epochs and {state['step']} steps")
    else:
        say("judging raw pixels and the untrained backbone, to compare with (up to a minute)")
        state = {"settings": settings, "epoch": 0, "step": 0, "seconds": 0.0, "busy": 0.0}
        pixels = nn.Sequential(nn.AdaptiveAvgPool2d(32), nn.Flatten())
        state["pixels"] = on_first(judge, *features_of(pixels, data, device, args.workers))
        features = features_of(model.backbone, data, device, args.workers)
        state["untrained"], state["neighbours"] = on_first(judge, *features), nearest(*features)
        state["correlation"] = on_first(correlation, model, data.unlabelled, augments, args)
        images = torch.stack([data.train[i] for i in range(min(8, len(data.train)))])
        on_first(draw_views, out / "views.png", images, augments)
    net = distribute(model, args, device)

    # The loop.
    steps = n // args.batch_size
    total, warmup = args.epochs * steps, round(min(10, args.epochs / 10) * steps)
    peaks = [lr * args.batch_size / 256 for lr in (args.lr_weights, args.lr_biases)]
    terms = state.get("terms", torch.zeros(steps, 2)).to(device)  # of the loss, step by step

    def check(epoch: int, step: int) -> None:
        bad = ~terms[: step + 1].isfinite().all(1)
        if bad.any() or not sum(p.detach().norm() for p in model.parameters()).isfinite():
            step = int(bad.int().argmax()) if bad.any() else step
            raise Failure(
                f"the loss is not finite in epoch {epoch + 1}, step {step + 1}: lower --lr-weights "
                f"({args.lr_weights}) and --lr-biases ({args.lr_biases}), and the same command "
                f"goes on from the last good checkpoint in {out}, if there is one"
            )

    def save(epoch: int, step: int) -> None:
        for buffer in model.buffers():  # BatchNorm's statistics differ between processes on CPUs
            if world > 1 and buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer /= world
        state.update(epoch=epoch + step // steps, step=step % steps, terms=terms.cpu())
        state.update(model=model.state_dict(), optimizer=optimizer.state_dict())
        seconds = state["seconds"] + time.monotonic() - began
        on_first(save_whole, state | {"seconds": seconds}, out / "checkpoint.pt")

    def report(epoch: int, first: int, step: int, seconds: float) -> None:
        """Says and logs the mean loss of the steps from `first` up to `step`."""
        invariance, redundancy = terms[first:step].mean(0).tolist()
        loss, lr = invariance + args.lambd * redundancy, optimizer.param_groups[0]["lr"]
        speed = (step - first) * args.batch_size / seconds
        left = int((total - epoch * steps - step) * args.batch_size / speed)
        say(
            f"epoch {epoch + 1}/{args.epochs}, step {step}/{steps}: "
            f"loss {loss:.2f} = invariance {invariance:.2f} + {args.lambd} * redundancy "
            f"{redundancy:.0f}, rate {lr:.2g}, {speed:.0f} images/s, {timedelta(seconds=left)} left"
        )
        line = dict(epoch=epoch + 1, step=step, loss=loss, invariance=invariance)
        line |= dict(redundancy=redundancy, lr=lr, images_per_second=speed)
        on_first(log, out, "train", line)
        state["busy"] += seconds

    def stop(number: int) -> None:
        say("stopped; the same command goes on from here")
        raise SystemExit(130 if number == signal.SIGINT else 0)

    for epoch in range(state["epoch"], args.epochs):
        first, since = state["step"], time.monotonic()
        loader = batches_of_epoch(data.unlabelled, epoch, first, args, device)
        with signals_caught() as caught:
            for step in range(first, steps):
                due = step == steps - 1 or time.monotonic() > since + 10
                with together():
                    images = next(loader)
                # 1 if a report is due on any of the processes, or the signal that one of them got.
                word = agree(max([int(due), *caught]))
                # Drawn anew from where we are, randomness leaves nothing to be saved.
                torch.manual_seed(hash((args.seed, epoch, step, process_rank())))
                share_of_peak = learning_rate(epoch * steps + step, total, warmup)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * share_of_peak
                terms[step] = training_step(net, optimizer, two_views(images, *augments), args)
                if word:
                    check(epoch, step)
                    report(epoch, first, step + 1, time.monotonic() - since)
                    first, since = step + 1, time.monotonic()
                if word > 1:
                    save(epoch, step + 1)
                    stop(word)
            save(epoch, steps)
        if word := agree(max(caught, default=0)):
            stop(word)
        if (epoch + 1) % math.ceil(args.epochs / 100) == 0 and epoch + 1 < args.epochs:
            x, y, val_x, val_y = features_of(model.backbone, data, device, args.workers, 5000)
            knn, rank = on_first(judge_knn, x, y, val_x, val_y), effective_rank(val_x)
            on_first(log, out, "eval", dict(epoch=epoch + 1, knn=knn, effective_rank=rank))
            say(
                f"after epoch {epoch + 1}: kNN accuracy {knn:.3f} with {len(x):,} labels, features "
                f"fill {rank:.0f} of {x.shape[1]} dimensions"
            )
            if warning := collapse(val_x, rank):
                say(warning)
            c = on_first(correlation, model, data.unlabelled, augments, args)
            on_first(draw_correlation, out / "correlation.png", state["correlation"], c)

    state["seconds"] += time.monotonic() - began
    return conclude(model, data, state, args, device)


def conclude(model: BarlowTwins, data: Data, state: dict, args, device: torch.device) -> dict:
    """Writes and judges the trained backbone; returns the result, which it logs."""
    say("judging the trained backbone")
    began, out = time.monotonic(), Path(args.out)
    weights = {key: value.cpu() for key, value in model.backbone.state_dict().items()}
    on_first(save_whole, weights, out / "backbone.pt")
    x, y, val_x, val_y = features_of(model.backbone, data, device, args.workers)
    judged = {"pixels": state["pixels"], "untrained": state["untrained"]}
    trained = on_first(judge, x, y, val_x, val_y)
    c = on_first(correlation, model, data.unlabelled, make_augments(args), args)
    on_first(draw_correlation, out / "correlation.png", state["correlation"], c)
    neighbours = state["neighbours"], nearest(x, y, val_x, val_y)
    on_first(draw_neighbours, out / "neighbours.png", data, *neighbours)
    seen = state["epoch"] * len(state["terms"]) * args.batch_size
    result = {
        "data": args.data,
        "epochs": state["epoch"],
        "seconds": state["seconds"] + time.monotonic() - began,
        "images_per_second": seen / state["busy"],
        "loss": float(state["terms"].mean(0) @ torch.tensor([1.0, args.lambd])),
        **trained,
        **{f"{key}_{name}": score for name in judged for key, score in judged[name].items()},
        "effective_rank": effective_rank(val_x),
    }
    on_first(log, out, "result", result)
    heading = f"accuracy with {len(y):,} labels"
    say(f"{heading:28}  linear probe     kNN")
    for name, scores in (judged | {"trained": trained}).items():
        name = "raw pixels" if name == "pixels" else f"{name} backbone"
        say(f"{name:28}  {scores['linear']:12.3f}   {scores['knn']:.3f}")
    if args.data == "shapes":
        then = "--data DIR --recipe quick, with your own images in DIR/train/CLASS/* and "
        then += "DIR/val/CLASS/*"
    else:
        then = f"--data {args.data} --recipe {args.recipe} --evaluate {out / 'backbone.pt'}"
    say(
        f"in {out}: backbone.pt to go on with, log.jsonl, and views.png, correlation.png and "
        f"neighbours.png to look at\nnext: torchrun barlow_twins.py {then}"
    )
    return result


def evaluate(args, device: torch.device) -> dict:
    """Judges the backbone in the file args.evaluate; returns what it logs last.

    Takes `backbone.pt`, `checkpoint.pt`, the authors' files and any state dict of a torchvision
    ResNet: architecture and stem are those that the weights fit.
    """
    weights = load_weights(Path(args.evaluate))
    weights = {
        re.sub(r"^(module\.)?(backbone\.)?", "", key): value
        for key, value in weights.get("model", weights).items()
        if not re.match(r"(module\.)?(projector|bn|fc)\.", key)
    }
    shapes_of = {key: value.shape for key, value in weights.items() if isinstance(value, Tensor)}
    for arch, small_images in product(["small", *RESNETS], [True, False]):
        with torch.device("meta"):
            backbone, _ = make_backbone(arch, small_images)
        if {key: value.shape for key, value in backbone.state_dict().items()} == shapes_of:
            break
    else:
        raise Failure(f"{args.evaluate} holds neither the small backbone nor a torchvision ResNet")
    backbone, _ = make_backbone(arch, small_images)
    backbone.load_state_dict(weights)
    backbone.to(device, memory_format=torch.channels_last)
    say(f"{args.evaluate}: {arch}, stem for {'small' if small_images else 'large'} images")

    data = open_data(args, device)
    say("extracting features, then judging them by kNN and by linear probes")
    x, y, val_x, val_y = features_of(backbone, data, device, args.workers)

    def judge_all() -> dict:
        scores = {f"knn_{k}": knn_votes(x, y, val_x, k) for k in (20, 200)}
        scores["linear"] = linear_logits(x, y, val_x)
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(args.seed))
        for percent in (10, 1):  # of each class
            of_classes = [order[y.cpu()[order] == label] for label in y.unique().tolist()]
            few = torch.cat([i[: math.ceil(len(i) * percent / 100)] for i in of_classes])
            scores[f"linear_{percent}_percent"] = linear_logits(x[few], y[few], val_x)
        result = {key: accuracy(value, val_y) for key, value in scores.items()}
        if len(data.classes) >= 100:
            result |= {f"{key}_top_5": accuracy(value, val_y, 5) for key, value in scores.items()}
        return result

    result = on_first(judge_all)
    said = {"file": args.evaluate, "data": args.data, **result}
    on_first(log, Path(args.out), "evaluation", said)
    say("accuracy on the validation images")
    for key, value in result.items():
        say(f"{key:>24}   {value:.3f}")
    return result


def benchmark(args, device: torch.device) -> dict:
    """Times training steps of the recipe, part by part, and prints a table and a JSON line.

    Beside them the limit: the same network trained on views that lie ready, to embeddings of length
    0, which costs next to nothing. On random images where the data are not there.
    """
    n, share, cuda = args.batch_size, args.batch_size // process_count(), device.type == "cuda"
    try:
        drawn = args.data == "shapes"  # a few are enough
        images = shapes(2 * n, 1, args.size)[0] if drawn else on_first(load_data, args).unlabelled
    except Failure as failure:
        say(f"{failure}\nso these are random images")
        images = torch.randint(256, (2 * n, 3, args.size, args.size), dtype=torch.uint8)
    images = images.to(device) if isinstance(images, Tensor) else images
    model, optimizer, augments = build(args, device)
    net, marks, times = distribute(model, args, device), [], {}

    def squares(z_a: Tensor, z_b: Tensor, _) -> tuple[Tensor, Tensor]:
        return z_a.square().mean(), z_b.square().mean()

    def mark(name: str) -> None:
        event = torch.cuda.Event(enable_timing=True) if cuda else time.perf_counter()
        if cuda:
            event.record()
        marks.append((name, event))

    order = torch.arange(100 * share).remainder(len(images)).view(100, share)
    loader, began = batches(images, order, device, args.workers), time.monotonic()
    for step in range(100):
        marks.clear()
        mark("")
        batch = next(loader)
        mark("load")
        views = two_views(batch, *augments)
        mark("views")
        training_step(net, optimizer, views, args, mark=mark)
        mark("between")
        training_step(net, optimizer, views, args, squares)
        mark("limit")
        z = torch.randn(2, n, model.projector[-1].out_features, device=device, requires_grad=True)
        mark("between")
        barlow_twins_loss(*z).backward()
        mark("loss alone")
        if cuda:
            torch.cuda.synchronize()
        for (_, start), (name, end) in pairwise(marks if step >= 3 else []):  # 3 to warm up
            ms = start.elapsed_time(end) if cuda else 1000 * (end - start)
            times.setdefault(name, []).append(ms)
        if step > 7 and time.monotonic() > began + 40:
            break
    del times["between"]
    limit, loss = times.pop("limit"), times.pop("loss alone")
    whole = [sum(parts) for parts in zip(*times.values(), strict=True)]
    rows = times | {"whole step": whole, "limit": limit, "loss, both ways": loss}
    say(f"{'milliseconds':>16}  median  lowest highest")
    for name, values in rows.items():
        say(f"{name:>16} {median(values):7.1f} {min(values):7.1f} {max(values):7.1f}")
    result = {
        "event": "benchmark",
        "recipe": args.recipe,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "images_per_second": 1000 * n / median(whole),
        "step_ms": median(whole),
        "limit_ms": median(limit),
        "step_over_limit": median(a / b for a, b in zip(whole, limit, strict=True)),
        "loss_share": median(loss) / median(whole),
    }
    if cuda:
        result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    say(json.dumps(result))
    return result


# -------------------------------------------------------------------------------- Command line

# What was tried. shapes, by the linear probe after 6 epochs in fp32: crops from 0.2 on gave 0.79,
# from 0.35 on 0.88; batches of 64, 128 and 256 gave 0.82, 0.88 and 0.88; half the rate 0.88, this
# one 0.90; projector 256-256-256 0.69, 512-512-512 0.88.
# quick, by kNN / linear probe after 300 seconds of one core on CIFAR-10 (JPEG copy) in bf16, with
# batches of 256: crops from 0.2 on 0.548 / 0.600, from 0.3 on 0.566 / 0.619, from 0.5 on 0.563 /
# 0.619; with projector 1024-1024-1024 from 0.2, 0.3 and 0.4 on 0.556 / 0.616, 0.569 / 0.623 and
# 0.578 / 0.628; 2048-2048-512 0.535 / 0.595; 1.5 times the rate 0.550 / 0.607. Batches of 128 and
# crops from 0.4 on 0.574 / 0.631; with these and after 600 seconds the small network 0.613 / 0.666,
# one 1.5 times as wide 0.593 / 0.659, one with a fifth convolution 0.594 / 0.648, six thinner ones
# 0.600 / 0.659: in the same time they take fewer steps.
# cifar10 is a first guess that has not been tuned; imagenet is the paper's.
RECIPES = {
    "shapes": dict(
        size=32, crop_scale=0.4, blur=(0.0, 0.0), solarize=(0.0, 0.2), in_memory=True,
        arch="small", small_images=True, projector="512-512-512", lambd=0.0051,
        epochs=9, batch_size=128, optimizer="adamw",
        lr_weights=8e-3, lr_biases=8e-3, weight_decay=0.0,
    ),
    "quick": dict(
        size=32, crop_scale=0.4, blur=(0.0, 0.0), solarize=(0.0, 0.2), in_memory=True,
        arch="small", small_images=True, projector="512-512-512", lambd=0.0051,
        epochs=20, batch_size=128, optimizer="adamw",
        lr_weights=6e-3, lr_biases=6e-3, weight_decay=0.0,
    ),
    "cifar10": dict(
        size=32, crop_scale=0.2, blur=(0.0, 0.0), solarize=(0.0, 0.2), in_memory=True,
        arch="resnet18", small_images=True, projector="2048-2048-2048", lambd=0.0051,
        epochs=200, batch_size=256, optimizer="adamw",
        lr_weights=2e-3, lr_biases=2e-3, weight_decay=1e-4,
    ),
    "imagenet": dict(
        size=224, crop_scale=0.08, blur=(1.0, 0.1), solarize=(0.0, 0.2), in_memory=False,
        arch="resnet50", small_images=False, projector="8192-8192-8192", lambd=0.0051,
        epochs=1000, batch_size=2048, optimizer="lars",
        lr_weights=0.2, lr_biases=0.0048, weight_decay=1.5e-6,
    ),
}  # fmt: skip


def number(kind: type, low: float, high: float = 1e9):
    """A type for argparse: a finite number within these bounds."""

    def parse(text: str):
        with suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        whole = "whole " * (kind is int)
        raise argparse.ArgumentTypeError(
            f"must be a {whole}number from {low:g} to {high:g}, not {text!r}"
        )

    return parse


def widths(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d{0,4}(-[1-9]\d{0,4})*", text):
        raise argparse.ArgumentTypeError(f"must be widths like 512-512-512, not {text!r}")
    return text


positive, probability, pair = number(float, 1e-12, 1e30), number(float, 0, 1), ("A", "B")
FLAGS = {  # the recipe's values are the defaults of those that it names
    "--data": dict(
        default="shapes", help="shapes, cifar10, or a folder with train/CLASS/*, val/CLASS/*"
    ),
    "--recipe": dict(choices=RECIPES, help="default: shapes, cifar10, or imagenet for a folder"),
    "--data-dir": dict(default="data", help="where CIFAR-10 is, or is downloaded to"),
    "--out": dict(help="folder for the log, checkpoint and backbone (default: runs/NAME)"),
    "--arch": dict(
        choices=["small", *RESNETS], metavar="ARCH", help="small or a torchvision ResNet"
    ),
    "--projector": dict(type=widths, help="widths of its layers, like 8192-8192-8192"),
    "--epochs": dict(type=number(int, 1)),
    "--batch-size": dict(type=number(int, 2), help="of all processes together"),
    "--optimizer": dict(choices=OPTIMIZERS),
    "--lr-weights": dict(type=positive, help="peak learning rate for 256 images"),
    "--lr-biases": dict(type=positive, help="the same for biases and BatchNorm"),
    "--weight-decay": dict(type=number(float, 0)),
    "--lambd": dict(type=number(float, 0), help="weight of the redundancy term"),
    "--redundancy": dict(choices=["cross", "auto"], default="cross", help="what its sum runs over"),
    "--size": dict(type=number(int, 8, 1024), help="side of a view in pixels"),
    "--crop-scale": dict(type=number(float, 1e-6, 1), help="smallest share of an image in a view"),
    "--blur": dict(type=probability, nargs=2, metavar=pair, help="probability in either view"),
    "--solarize": dict(type=probability, nargs=2, metavar=pair, help="probability in either view"),
    "--workers": dict(type=number(int, 0, 1024), default=os.cpu_count(), help="to read files"),
    "--seed": dict(type=number(int, 0, 2**31), default=0),
    "--evaluate": dict(metavar="FILE", help="judge the backbone in a file instead of training"),
    "--benchmark": dict(action="store_true", help="time the steps of the recipe instead"),
    "--compile": dict(action="store_true", help="torch.compile the network"),
    "--precision": dict(choices=["fp32", "bf16"], help="default: bf16 where it is fast"),
}


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags, completed by the recipe. Bad ones exit with 2."""
    parser = argparse.ArgumentParser(
        description="Barlow Twins: self-supervised learning by redundancy reduction.",
        epilog="The same command again goes on from the last checkpoint in --out.",
    )
    parser.error = refuse
    for flag, options in FLAGS.items():
        parser.add_argument(flag, **options)
    args = parser.parse_args(argv)
    name, default = Path(args.data).resolve().name, "imagenet"
    if args.data in ("shapes", "cifar10"):
        default = args.data
    args.recipe = args.recipe or default
    args.out = args.out or f"runs/{name}" + f"-{args.recipe}" * (args.recipe != default)
    for key, value in RECIPES[args.recipe].items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
    args.precision = args.precision or ("bf16" if bf16 else "fp32")
    return args


def refuse(message: str, code: int = 2) -> None:
    """Says what is wrong, once for all processes, and exits."""
    if os.environ.get("RANK", "0") == "0":
        print(f"barlow_twins.py: {message}", file=sys.stderr)
    sys.exit(code)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))  # see also signals_caught
    try:
        task = evaluate if args.evaluate else benchmark if args.benchmark else train
        task(args, start_processes())
    except Failure as failure:
        # From a DataLoader's worker it comes wrapped in the worker's traceback.
        refuse(str(failure).rsplit("Failure: ")[-1].strip(), code=1)
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        refuse("out of memory: lower --batch-size, --projector or --size", code=1)
    except KeyboardInterrupt:
        refuse("interrupted; the same command goes on from the last checkpoint", code=130)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
