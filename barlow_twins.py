"""Barlow Twins (Zbontar et al. 2021, https://arxiv.org/abs/2103.03230) in one file.

Two augmented views of every image go through one network. Each unit of the embedding is
standardized over the batch, and C, the cross-correlation matrix of the two batches of embeddings,
is driven towards the identity: its diagonal asks that both views of an image get one embedding,
the rest that no unit repeats another. There are no negative pairs, no momentum encoder and no
stop-gradient. After training the projector is thrown away and the backbone is kept.

    loss = sum_i (1 - C_ii)^2 + lambda * sum_{i != j} C_ij^2

In the paper    Here
X               images, uint8 (N, 3, H, W)
T, T'           two calls of augment
Y^A, Y^B        view_a, view_b, float (N, 3, size, size)
f               net: the backbone makes representations (N, F), the projector embeddings of them
Z^A, Z^B        z_a, z_b, embeddings (N, D)
C, lambda       cross_correlation(z_a, z_b), (D, D); lambd

    torchrun barlow_twins.py                                         # built-in data, a minute
    torchrun barlow_twins.py --data cifar10                          # CIFAR-10, three minutes
    torchrun barlow_twins.py --data cifar10 --recipe resnet18        # ... on a GPU
    torchrun --nproc-per-node 8 barlow_twins.py --data imagenet/     # a folder: the paper's recipe

`python barlow_twins.py` is one process. After every epoch a run writes a checkpoint, from which the
same command goes on. All randomness follows from seed, epoch and process (and, for files, from
--workers). In the end a linear probe and kNN judge the backbone by whole images.
"""

import argparse
import json
import math
import os
import re
import sys
import time
import zipfile
from copy import copy
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset
from torchvision import datasets, models
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# ------------------------------------------------------------------------------------- Recipes
# small: for any CPU, found by trying (.github/measured.md).
# resnet18: for CIFAR-10 on a GPU, as in lightly's benchmark (https://docs.lightly.ai).
# resnet50: for ImageNet, as the authors (paper, section 2.2, and their code), with two numbers
#   rescaled. Each of their 16 GPUs has a part of the gradient. The true one is the sum of all (see
#   gather_batch), but they take the mean: 1/16 of ours. Hence the rate of biases is 0.0048 / 16.
#   LARS ignores the length of a gradient, but not its ratio to the decay: hence 1e-6 * 16.
#   Images are read and cropped in every epoch (args.from_files); the others keep them in memory.

RECIPES = ("small", "resnet18", "resnet50")
# fmt: off
SETTINGS = {
    #                small          resnet18     resnet50          meaning
    "arch":         ("small",       "resnet18",  "resnet50",       "small or a torchvision ResNet"),
    "projector":    ("512-512-512", "2048-2048", "8192-8192-8192", "widths of its layers"),
    "lambd":        (0.01,          0.005,       0.0051,           "weight of the redundancy term"),
    "size":         (20,            32,          224,              "side of a view in pixels"),
    "crop_scale":   (0.4,           0.08,        0.08,             "least part of image in view"),
    "epochs":       (5,             200,         1000,             "passes over the images"),
    "batch_size":   (128,           128,         2048,             "images of all processes"),
    "optimizer":    ("lars",        "sgd",       "lars",           "lars or sgd; set rates, too"),
    "lr_weights":   (10.0,          0.12,        0.2,              "peak rate for batches of 256"),
    "lr_biases":    (0.1,           0.12,        0.0003,           "... of biases and BatchNorm"),
    "weight_decay": (0.0,           5e-4,        1.6e-5,           "weight decay"),
    "labels":       (10_000,        50_000,      50_000,           "training labels to judge with"),
    "redundancy":   ("cross",       "cross",     "cross",          "cross or auto, see loss_terms"),
    "workers":      (0,             0,           8,                "processes to read images"),
    "seed":         (0,             0,           0,                "makes runs differ"),
    "data_dir":     ("data",        "data",      "data",           "where CIFAR-10 is or will be"),
}
# fmt: on


# ---------------------------------------------------------------------------------------- Loss
def standardize(z_a, z_b):
    """Gives each unit mean 0 and variance 1 over the batch: (N, D), (N, D) -> the same in float32.
    Raises ValueError unless both have one shape (N, D) with N of 2 or more."""
    if z_a.shape != z_b.shape or z_a.ndim != 2 or len(z_a) < 2:
        raise ValueError(f"embeddings are (N, D), N of 2 or more, not {z_a.shape}, {z_b.shape}")
    # BatchNorm with the eps of the authors' code, which keeps a constant unit at 0.
    a = F.batch_norm(z_a.float(), None, None, training=True, eps=1e-5)
    b = F.batch_norm(z_b.float(), None, None, training=True, eps=1e-5)
    return a, b


def cross_correlation(z_a, z_b):
    """C, (D, D), the correlations, from -1 to 1, of the units of z_a, (N, D), with those of z_b,
    (N, D) (paper, equation 2). For pictures and tests: `loss_terms` needs only sums over C."""
    a, b = standardize(z_a, z_b)
    with torch.autocast(a.device.type, enabled=False):
        return a.T @ b / len(a)


def loss_terms(z_a, z_b, redundancy="cross"):
    """sum_i (1 - C_ii)^2 and sum_{i != j} C_ij^2, the two sums of equation 1, as float32 scalars.

    z_a, z_b: (N, D), the embeddings of the two views; row n of both belongs to image n.
    redundancy: "cross" sums over C, as the paper does; "auto" over the autocorrelation of z_a, as
        its derivation from the information bottleneck asks for (appendix A).
    Raises ValueError for another redundancy and for shapes that do not fit."""
    if redundancy not in ("cross", "auto"):
        raise ValueError(f'redundancy is "cross" or "auto", not {redundancy!r}')
    a, b = standardize(z_a, z_b)
    n, d = a.shape
    diagonal = (a * b).mean(dim=0)  # of C
    invariance_term = (1 - diagonal).square().sum()
    partner = b
    if redundancy == "auto":
        partner = a
        diagonal = (a * a).mean(dim=0)  # of the autocorrelation
    with torch.autocast(a.device.type, enabled=False):  # whatever the caller does
        if d <= n:
            squares = (a.T @ partner / n).square().sum()
        else:
            # ||A^T B||^2 = tr(A A^T B B^T): with more units than images, as in all recipes, these
            # N x N matrices are smaller than C, D x D (Garrido et al. 2022, arXiv 2206.02574).
            squares = ((a @ a.T) * (partner @ partner.T)).sum() / n**2
    return invariance_term, squares - diagonal.square().sum()


def barlow_twins_loss(z_a, z_b, lambd=0.0051, redundancy="cross"):
    """Equation 1 of the paper, a float32 scalar, with the arguments of `loss_terms`."""
    invariance_term, redundancy_term = loss_terms(z_a, z_b, redundancy)
    return invariance_term + lambd * redundancy_term


def loss_floor(n, d, lambd):
    """What the loss ("cross") of n images and d units cannot go below: n images decorrelate n - 1
    units at most.

    Centred units leave C at most n - 1 singular values, so by Cauchy-Schwarz its squares sum to
    (tr C)^2 / (n - 1) or more. With lambd <= 1 the resulting bound is convex in the C_ii, so it is
    least where all are one c: d (1 - c)^2 + lambd * d * excess * c^2, least at
    c = 1 / (1 + lambd * excess). With a larger lambd the floor for 1 holds: the loss only grows."""
    excess = max(0.0, d / (n - 1) - 1)
    lambd = min(lambd, 1.0)
    return lambd * d * excess / (1 + lambd * excess)


def gather_batch(z):
    """The embeddings of the whole batch: (n, D) in each of W processes -> (W * n, D) in all.

    Every process computes the loss of all rows, but passes its gradient to its own rows only, so
    the true gradient is the sum of all. DistributedDataParallel averages them: hence a factor W.
    n must be the same in all processes. (To act exactly as one they must synchronize BatchNorm.)"""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.detach().contiguous())
    parts[dist.get_rank()] = z  # with its gradient
    batch = torch.cat(parts)
    if batch.requires_grad:
        batch.register_hook(lambda grad: grad * len(parts))  # parts without a gradient ignore it
    return batch


# --------------------------------------------------------------------------------------- Views
# torchvision's operations, but for a batch on the device that trains, each image with parameters
# of its own. x is float (N, 3, H, W) in [0, 1], a parameter (N, 1, 1, 1).


def uniform(x, low, high):
    """A random number for each image of x: (N, 1, 1, 1)."""
    return x.new_empty(len(x), 1, 1, 1).uniform_(low, high)


def sometimes(p, changed, x):
    """Each image is taken from `changed` with probability p, else from x."""
    chosen = (uniform(x, 0, 1) < p).float()
    return torch.lerp(x, changed, chosen)  # faster than torch.where


def crop_and_flip(x, size, scale):
    """v2.RandomResizedCrop and v2.RandomHorizontalFlip, bilinear, without antialiasing:
    (N, 3, H, W), of any range -> (N, 3, size, size). The area of a crop is uniform in `scale`, the
    ratio of its sides log-uniform from 3/4 to 4/3, or nearer to 1 where the area is large, so that
    every crop fits (torchvision draws again)."""
    # Both sides of an image have length 2, from -1 to 1, those of a crop 2 * width and 2 * height.
    # width^2 = area * ratio and height^2 = area / ratio are at most 1 if |log ratio| <= -log area.
    area = uniform(x, *scale)
    bound = (-area.log()).clamp(max=math.log(4 / 3))
    ratio = (bound * uniform(x, -1, 1)).exp()
    width = (area * ratio).sqrt()
    height = (area / ratio).sqrt()
    centre_x = (1 - width) * uniform(x, -1, 1)
    centre_y = (1 - height) * uniform(x, -1, 1)
    flip = torch.where(uniform(x, -1, 1) < 0, -1.0, 1.0)
    # Point (x, y) of a view, also from -1 to 1, is read at matrix @ (x, y, 1) of the image.
    zero = torch.zeros_like(width)
    matrix = torch.cat([flip * width, zero, centre_x, zero, height, centre_y], dim=1)
    grid = F.affine_grid(matrix.view(-1, 2, 3), [len(x), 3, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def adjust_hue(x, turn):
    """Turns the hue by a fraction of the colour circle, where red, green and blue lie at 0, 2 and 4
    sixths (Smith 1978; Wikipedia, "HSL and HSV")."""
    red, green, blue = x.split(1, dim=1)
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    # The hue lies around the largest channel, on the side of the second.
    offset = torch.where(value == green, 2 * chroma + blue - red, 4 * chroma + red - green)
    offset = torch.where(value == red, green - blue, offset)
    hue = (offset / chroma.clamp(min=1e-12) + 6 * turn) % 6  # in sixths
    # Back to RGB: a channel is `value` up to one sixth from its own place, `value - chroma` from
    # two sixths on, and falls in between.
    places = torch.arange(0, 6, 2, device=x.device).view(3, 1, 1)
    distance = (hue - places).abs()
    distance = torch.minimum(distance, 6 - distance)  # the shorter way round the circle
    return value - chroma * (distance - 1).clamp(0, 1)


def color_jitter(x):
    """v2.ColorJitter(0.4, 0.4, 0.2, 0.1), with one random order of the operations for the batch."""
    operations = ["brightness", "contrast", "saturation", "hue"]
    for i in torch.randperm(4).tolist():
        if operations[i] == "brightness":
            x = (uniform(x, 0.6, 1.4) * x).clamp_(0, 1)
        elif operations[i] == "contrast":
            mean = TF.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True)
            x = torch.lerp(mean, x, uniform(x, 0.6, 1.4)).clamp_(0, 1)
        elif operations[i] == "saturation":
            x = torch.lerp(TF.rgb_to_grayscale(x, 3), x, uniform(x, 0.8, 1.2)).clamp_(0, 1)
        else:
            x = adjust_hue(x, uniform(x, -0.1, 0.1))
    return x


def gaussian_blur(x, sigma):
    """Blurs the rows and the columns of x by a matrix for each image; sigma is in pixels."""
    pixel = torch.arange(x.shape[-1], device=x.device)
    distance = pixel - pixel.view(-1, 1)
    # exp(-distance^2 / (2 sigma^2)), divided by its sum
    kernel = torch.softmax(-0.5 * (distance / sigma).square(), dim=-1)
    return (kernel @ (kernel @ x).mT).mT


def normalize(x):
    """Standardizes the channels by ImageNet's means and deviations, as torchvision's models do."""
    red, green, blue = x.unbind(dim=1)
    # By numbers, because to copy a tensor of them to the GPU is to wait for it.
    channels = [(red - 0.485) / 0.229, (green - 0.456) / 0.224, (blue - 0.406) / 0.225]
    return torch.stack(channels, dim=1)


def augment(images, size, scale=(0.08, 1.0), blur=0.0, solarize=0.0):
    """T or T' (paper, section 2.1): uint8 (N, 3, H, W) -> normalized float (N, 3, size, size).

    scale: the least and the largest part of an image in a view; None if it is cropped already.
    blur, solarize: probabilities. The blur's sigma is 0.1 to 2 pixels at a size of 224 (BYOL, arXiv
        2006.07733, appendix B), and less in proportion at smaller ones."""
    # v2.RandomResizedCrop(size, scale) and v2.RandomHorizontalFlip()
    x = crop_and_flip(images.float(), size, scale or (1.0, 1.0)) / 255
    x = sometimes(0.8, color_jitter(x), x)  # v2.RandomApply([v2.ColorJitter(.4, .4, .2, .1)], 0.8)
    x = sometimes(0.2, TF.rgb_to_grayscale(x, 3), x)  # v2.RandomGrayscale(0.2)
    if size > 32:  # up to there sigma is below 0.3, which changes next to nothing
        sigma = uniform(x, 0.1, 2.0) * size / 224
        x = sometimes(blur, gaussian_blur(x, sigma), x)  # v2.RandomApply([v2.GaussianBlur], blur)
    x = sometimes(solarize, torch.minimum(x, 1 - x), x)  # v2.RandomSolarize(0.5, solarize)
    return normalize(x)


# ------------------------------------------------------------------------------------- Network
def small_backbone():
    """Three convolutions with BatchNorm and ReLU: (N, 3, H, W) -> (N, 1024)."""
    return nn.Sequential(
        Conv2dNormActivation(3, 64, stride=2),
        Conv2dNormActivation(64, 128, stride=2),
        Conv2dNormActivation(128, 256),
        nn.AdaptiveAvgPool2d(2),  # the mean of each quarter tells where things are
        nn.Flatten(),
    )


class BarlowTwins(nn.Module):
    """Backbone and projector (paper, section 2.2): two views (N, 3, H, W) -> z_a, z_b, (N, D).

    arch: "small" or the name of a torchvision ResNet.
    projector: the widths of its layers, such as "8192-8192-8192"; the last one is D.
    small_images: 3x3 stem without max-pool (SimCLR, arXiv 2002.05709, appendix B.9)."""

    def __init__(self, arch="resnet18", projector="2048-2048-2048", small_images=True):
        super().__init__()
        if arch == "small":
            self.backbone = small_backbone()
            width = 1024
        else:
            # The authors' choice: residual branches begin at 0.
            self.backbone = models.get_model(arch, zero_init_residual=True)
            width = self.backbone.fc.in_features
            self.backbone.fc = nn.Identity()
            if small_images:
                self.backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
                self.backbone.maxpool = nn.Identity()
        *hidden_widths, d = [int(number) for number in projector.split("-")]
        layers = []
        for hidden in hidden_widths:
            layers += [nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()]
            width = hidden
        layers.append(nn.Linear(width, d, bias=False))  # the loss standardizes what comes out
        self.projector = nn.Sequential(*layers)

    def forward(self, view_a, view_b):
        return self.projector(self.backbone(view_a)), self.projector(self.backbone(view_b))


def build(args):
    """The network of these settings, with weights drawn by the seed."""
    torch.manual_seed(args.seed)
    model = BarlowTwins(args.arch, args.projector, small_images=args.recipe != "resnet50")
    return model.to(DEVICE, memory_format=torch.channels_last)  # faster for convolutions


# ----------------------------------------------------------------------------------- Optimizer
class LARS(torch.optim.Optimizer):
    """SGD with momentum and steps in proportion to the norm of each layer's weights w:

        g <- g + weight_decay * w
        g <- g * eta * |w| / |g|
        m <- momentum * m + g
        w <- w - lr * m

    (You et al. 2017, arXiv 1708.03888.) As in the authors' code, vectors (biases, BatchNorm) skip
    the first two lines, and the factor of the second is 1 where either norm is 0."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, eta=0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, eta=eta))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is None:
                    continue
                g = w.grad
                if w.ndim > 1:
                    g = g.add(w, alpha=group["weight_decay"])
                    factor = group["eta"] * w.norm() / g.norm()
                    g.mul_(torch.where(factor.isfinite() & (factor > 0), factor, 1.0))
                if w not in self.state:
                    self.state[w]["m"] = torch.zeros_like(w)
                m = self.state[w]["m"].mul_(group["momentum"]).add_(g)
                w.sub_(m, alpha=group["lr"])


def make_optimizer(args, model):
    """Weights and vectors have rates of their own, which `train` sets in every step. LARS decays
    weights only, as the authors', SGD both, as lightly's."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    kind = {"lars": LARS, "sgd": torch.optim.SGD}[args.optimizer]
    groups = [{"params": weights}, {"params": vectors}]
    return kind(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)


def learning_rate(epoch, epochs):
    """Fraction of the peak rate at a moment, such as epoch 2.5 (paper, section 2.2): a linear
    warm-up of 10 epochs, or a tenth of the run if it is less, then half a cosine to 0.001."""
    warmup = min(10, epochs / 10)
    if epoch < warmup:
        return epoch / warmup
    cosine = 0.5 + 0.5 * math.cos(math.pi * (epoch - warmup) / (epochs - warmup))
    return 0.001 + 0.999 * cosine


# ------------------------------------------------------------------------------------ Training
# `main` has started the process group. Further down stands what `train` reads (`load_data`), is
# watched by (`extract_features`, `knn_accuracy`), prints (`report`) and keeps (`log`, checkpoints).


class Failure(Exception):
    """One sentence for the user: what is wrong and what to do. `main` prints it and exits."""


def train(args, train_set, whole_set, val_set):
    """Trains a network on views of train_set, watched by whole images of the other two sets, and
    returns it with its state: epochs, seconds, images_per_second, loss and floor.

    Goes on from the checkpoint in args.out, which it writes after every epoch. Raises Failure if
    batch size or checkpoint do not fit, and if the loss is not finite."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if args.batch_size % world_size or not 2 * world_size <= args.batch_size <= len(train_set):
        limits = f"a multiple of {world_size} processes, 2 images each to {len(train_set)} in all"
        raise Failure(f"--batch-size must be {limits}, not {args.batch_size}")
    model = build(args)
    if DEVICE.type == "cuda":  # on CPUs BatchNorm sees the images of its own process only
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if args.compile:
        model.compile()
    optimizer = make_optimizer(args, model)
    state = load_checkpoint(args, model, optimizer)
    if rank == 0:
        log(args, "config", **vars(args), processes=world_size, torch=torch.__version__)
    net = nn.parallel.DistributedDataParallel(model)
    sampler = DistributedSampler(train_set, seed=args.seed, drop_last=True)
    n = args.batch_size // world_size
    options = {"num_workers": args.workers, "pin_memory": DEVICE.type == "cuda"}
    loader = DataLoader(train_set, n, sampler=sampler, drop_last=True, **options)
    steps = len(loader)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.precision == "bf16")
    scale = None if args.from_files else (args.crop_scale, 1.0)  # load_data has cropped files
    watched = some(whole_set, 2000), some(val_set, 2000)
    if rank == 0 and state["epochs"] >= args.epochs:
        print(f"{args.out} holds a run of {state['epochs']} epochs, which is judged again")

    for epoch in range(state["epochs"], args.epochs):
        # All randomness of an epoch follows from these two lines, so none of it need be saved.
        torch.manual_seed(hash((args.seed, epoch, rank)))  # of integers: the same in every run
        sampler.set_epoch(epoch)
        sums = torch.zeros(2, device=DEVICE)
        started = time.monotonic()
        net.train()
        for step, (images, _) in enumerate(loader, start=1):
            factor = args.batch_size / 256 * learning_rate(epoch + (step - 1) / steps, args.epochs)
            lr = args.lr_weights * factor
            optimizer.param_groups[0]["lr"] = lr
            optimizer.param_groups[1]["lr"] = args.lr_biases * factor
            images = images.to(DEVICE, non_blocking=True)
            # Files come as two crops of each image, (n, 2, 3, size, size).
            images_a, images_b = images.unbind(1) if args.from_files else (images, images)
            view_a = augment(images_a, args.size, scale, blur=1.0, solarize=0.0)  # T
            view_b = augment(images_b, args.size, scale, blur=0.1, solarize=0.2)  # T'
            with autocast:
                z_a, z_b = net(view_a, view_b)
            z_a, z_b = gather_batch(z_a), gather_batch(z_b)
            invariance, redundancy = loss_terms(z_a, z_b, args.redundancy)
            loss = invariance + args.lambd * redundancy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            sums += torch.stack([invariance, redundancy]).detach()
            # Not after every step, because to read the loss is to wait for the GPU.
            if rank == 0 and (step % 100 == 0 or step == steps):
                state |= report(args, model, epoch + 1, step, steps, sums, lr, started)
        if rank == 0:  # the others wait in their next step
            state["epochs"] = epoch + 1
            state["seconds"] += time.monotonic() - started
            save_checkpoint(args, model, optimizer, state)
            with autocast:  # only to watch; the result is computed without
                train_features = extract_features(model.backbone, whole_images(watched[0], args))
                val_features = extract_features(model.backbone, whole_images(watched[1], args))
            knn = knn_accuracy(*train_features, *val_features, k=20)
            print(f"epoch {epoch + 1}/{args.epochs}: kNN {knn:.3f}", flush=True)
            log(args, "eval", epoch=epoch + 1, seconds=state["seconds"], knn=knn)
    return model, state


# ---------------------------------------------------------------------------------------- Data
def shapes(n, seed, size=32):
    """n gray drawings of flowers of 1 to 5 petals, filled or in outline, which are ten classes:
    images, uint8 (n, 3, size, size), and their labels, int64 (n,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    petals = (1 + labels % 5).view(n, 1, 1)
    outlined = (labels >= 5).view(n, 1, 1)
    centre_x, centre_y, extent, gray, sign = torch.rand(5, n, 1, 1, generator=generator)
    axis = torch.linspace(-0.5, 1.5, size)  # of the image; centres lie from 0 to 1
    x = axis - centre_x  # (n, 1, size)
    y = axis.view(size, 1) - centre_y  # (n, size, 1)
    # The outline's distance from the centre, in the direction of each pixel:
    edge = (0.4 + 0.3 * extent) * (0.7 + 0.3 * torch.cos(petals * torch.atan2(y, x)))
    distance = torch.hypot(x, y) - edge  # in units of half an image, negative inside
    distance = torch.where(outlined, distance.abs() - 0.08, distance)
    inside = torch.sigmoid(-size * distance)  # with a soft edge of about a pixel
    contrast = 0.4 * (sign - 0.5).sign()  # light on dark or dark on light
    drawing = 0.3 + 0.4 * gray + contrast * (inside - 0.5)
    noise = 0.08 * torch.randn(n, 3, size, size, generator=generator)
    return (255 * (drawing.unsqueeze(1) + noise)).clamp(0, 255).byte(), labels


def read_image(path):
    """The PIL image in a file. Raises OSError, which names the file."""
    try:
        return datasets.folder.default_loader(path)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise OSError(f"cannot read the image {path}: {error}") from None


def two_crops(crop, image):
    return torch.stack([crop(image), crop(image)])


def read_all(dataset):
    """The images and labels of a data set in memory."""
    loader = DataLoader(dataset, 100, num_workers=torch.get_num_threads())
    parts = [(x.clone(), y.clone()) for x, y in loader]  # a worker's tensors keep files open
    images, labels = zip(*parts, strict=True)
    return TensorDataset(torch.cat(images), torch.cat(labels))


def load_data(args):
    """Training set, whole training images and whole validation images: uint8 (3, H, W) and a label.

    Without args.from_files all are in memory, square, with a side of 32 or --size if it is more
    (drawings: 32), and the first two are one. With it images are read when they are needed, those
    of the first as two random crops, (2, 3, size, size). Raises Failure; OSError for an image."""
    if args.data == "shapes":
        train_set = TensorDataset(*shapes(16_000, seed=1))
        return train_set, train_set, TensorDataset(*shapes(4_000, seed=2))
    side = max(32, args.size)
    around = side * 8 // 7 if args.from_files else side  # 256 around 224, as usual for ImageNet
    bicubic = v2.InterpolationMode.BICUBIC
    whole = v2.Compose([v2.Resize(around, bicubic), v2.CenterCrop(side), v2.PILToTensor()])
    try:
        if args.data == "cifar10":
            if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
                datasets.CIFAR10(args.data_dir, download=True)
            if dist.is_initialized():
                dist.barrier()
            whole_set = datasets.CIFAR10(args.data_dir, train=True, transform=whole)
            val_set = datasets.CIFAR10(args.data_dir, train=False, transform=whole)
        else:
            whole_set = datasets.ImageFolder(f"{args.data}/train", whole, loader=read_image)
            val_set = datasets.ImageFolder(f"{args.data}/val", whole, loader=read_image)
            if whole_set.classes != val_set.classes:
                raise Failure(f"--data {args.data}: train and val must hold the same classes")
    except (OSError, RuntimeError) as error:
        needs = "train/CLASS/*, val/CLASS/*; cifar10 the internet or its .tar.gz in --data-dir"
        raise Failure(f"cannot use --data {args.data} ({error}): a folder needs {needs}") from None
    if not args.from_files:
        whole_set = read_all(whole_set)
        return whole_set, whole_set, read_all(val_set)
    crop = v2.RandomResizedCrop(args.size, (args.crop_scale, 1.0), interpolation=bicubic)
    train_set = copy(whole_set)
    train_set.transform = partial(two_crops, v2.Compose([crop, v2.PILToTensor()]))
    return train_set, whole_set, val_set


def some(dataset, count):
    """A part of a data set, drawn at random, but always the same."""
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return Subset(dataset, drawn[:count].tolist())


def whole_images(dataset, args):
    """Batches of normalized images, float (n, 3, H, W), and their labels, (n,)."""
    for images, labels in DataLoader(dataset, 500, num_workers=args.workers):
        yield normalize(images.to(DEVICE) / 255), labels.to(DEVICE)


# ------------------------------------------------------------------------------------- Judging
@torch.no_grad()
def extract_features(backbone, batches):
    """Representations, float32 (N, F), and labels, (N,), from batches of normalized images,
    (n, 3, H, W), and labels, (n,)."""
    backbone.eval()
    features, labels = zip(*[(backbone(x), y) for x, y in batches], strict=True)
    return torch.cat(features).float(), torch.cat(labels)


def knn_accuracy(train_x, train_y, test_x, test_y, k=200, temperature=0.1):
    """Accuracy of a vote of the k nearest training images, weighted by exp(cosine / temperature)
    (Wu et al. 2018, arXiv 1805.01978). Representations (N, F), labels (N,); (M, F), (M,)."""
    correct = 0
    train_x = F.normalize(train_x)
    # In parts, because M * N cosines may not fit into memory.
    for x, y in zip(F.normalize(test_x).split(1000), test_y.split(1000), strict=True):
        cosine, nearest = (x @ train_x.T).topk(min(k, len(train_x)))
        votes = x.new_zeros(len(x), int(train_y.max()) + 1)
        votes.scatter_add_(1, train_y[nearest], (cosine / temperature).exp())
        correct += int((votes.argmax(dim=1) == y).sum())
    return correct / len(test_y)


def linear_accuracy(train_x, train_y, test_x, test_y):
    """Accuracy of a linear probe: a logistic regression on representations that are centred and
    divided by one number, so that those of training have an average variance of 1. The penalty is
    0.005 |w|^2: half or twice as much changes little (.github/measured.md). Shapes as above."""
    mean = train_x.mean(dim=0)
    scale = train_x.var(dim=0).mean().sqrt().clamp(min=1e-12)
    train_x = (train_x - mean) / scale
    test_x = (test_x - mean) / scale
    probe = nn.Linear(train_x.shape[1], int(train_y.max()) + 1, device=train_x.device)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(train_x), train_y) + 0.005 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float((probe(test_x).argmax(dim=1) == test_y).float().mean())


def judge(args, model, whole_set, val_set, state):
    """Prints and logs the accuracies of raw pixels, the untrained and the trained backbone."""
    train_set = some(whole_set, args.labels)
    k = max(1, min(200, len(train_set) // 50))  # a fiftieth, at most the usual 200
    pixels = nn.Sequential(nn.AdaptiveAvgPool2d(32), nn.Flatten())
    untrained = build(args).backbone
    # BatchNorm's statistics come from training, so an untrained network gets them here. (From an
    # even number of images, because it can't do with one in the last batch.)
    count = min(2000, len(whole_set) // 2 * 2)
    update_bn(whole_images(some(whole_set, count), args), untrained)
    rows = [("raw pixels", "_pixels", pixels), ("untrained", "_untrained", untrained)]
    rows.append(("trained", "", model.backbone))
    scores = {}
    print("features    linear probe    kNN")
    for name, suffix, backbone in rows:
        train_features = extract_features(backbone, whole_images(train_set, args))
        val_features = extract_features(backbone, whole_images(val_set, args))
        linear = linear_accuracy(*train_features, *val_features)
        knn = knn_accuracy(*train_features, *val_features, k)
        scores |= {f"linear{suffix}": linear, f"knn{suffix}": knn}
        print(f"{name:10}         {linear:.3f}  {knn:.3f}", flush=True)
    origin = {"data": args.data, "recipe": args.recipe, "labels": len(train_set)}
    log(args, "result", **origin, **state, **scores)


# ------------------------------------------------------------------------------------ Pictures
@torch.no_grad()
def draw_pictures(args, model, train_set):
    """views.png: pairs of views. correlation.png: C of 256 units before and after training, from -1
    (blue) over 0 (white) to 1 (red), by up to 4,096 images, with which a 0 scatters by 1/64."""
    untrained = build(args)
    model.train()  # BatchNorm by each batch, as in the untrained one, which has no statistics
    drawn = some(train_set, 4096)
    scale = None if args.from_files else (args.crop_scale, 1.0)
    embeddings = []
    n = min(128, len(drawn))
    for images, _ in DataLoader(drawn, n, num_workers=args.workers, drop_last=True):
        images = images.to(DEVICE)
        images_a, images_b = images.unbind(1) if args.from_files else (images, images)
        view_a = augment(images_a, args.size, scale, blur=1.0, solarize=0.0)
        view_b = augment(images_b, args.size, scale, blur=0.1, solarize=0.2)
        z = torch.stack([*untrained(view_a, view_b), *model(view_a, view_b)])  # (4, n, D)
        embeddings.append(z[:, :, :256])
    before_a, before_b, after_a, after_b = torch.cat(embeddings, dim=1)
    c = torch.stack([cross_correlation(before_a, before_b), cross_correlation(after_a, after_b)])
    # red, green, blue
    colours = torch.stack([1 + c.clamp(max=0), 1 - c.abs(), 1 - c.clamp(min=0)], dim=1)
    save_image(colours, Path(args.out, "correlation.png"), pad_value=1.0)
    pairs = torch.stack([view_a, view_b], dim=1)[:32].flatten(0, 1)  # of the last batch
    save_image(F.interpolate(pairs, 96), Path(args.out, "views.png"), normalize=True)


# -------------------------------------------------------------------------------- Command line
def log(args, event, **values):
    """Appends a line to log.jsonl."""
    with open(Path(args.out, "log.jsonl"), "a") as file:
        file.write(json.dumps({"event": event, **values}) + "\n")


def report(args, model, epoch, step, steps, sums, lr, started):
    """Prints and logs where training stands after `step` of `steps` in an epoch that began at the
    moment `started`. sums: of both terms of the loss since the epoch began, (2,).
    Returns loss, floor and images_per_second. Raises Failure if loss or weights are not finite."""
    seconds = time.monotonic() - started
    invariance, redundancy = (sums / step).tolist()
    loss = invariance + args.lambd * redundancy
    if not math.isfinite(loss + nn.utils.get_total_norm(model.parameters())):
        hint = "choose lower --lr-weights and --lr-biases, and another --out"
        raise Failure(f"loss or weights are not finite in epoch {epoch}: {hint}")
    d = model.projector[-1].out_features
    floor = loss_floor(args.batch_size, d, args.lambd) if args.redundancy == "cross" else None
    floor_text = "" if floor is None else f" (floor {floor:.1f})"
    speed = step * args.batch_size / seconds
    minutes = seconds / step * ((args.epochs - epoch + 1) * steps - step) / 60
    print(
        f"epoch {epoch}/{args.epochs}: loss {loss:.2f} =",
        f"{invariance:.2f} + {args.lambd} * {redundancy:.1f}{floor_text},",
        f"rate {lr:.3g}, {speed:.0f} images/s, {minutes:.1f} minutes left",
        flush=True,
    )
    terms = {"invariance": invariance, "redundancy": redundancy}
    latest = {"loss": loss, "floor": floor, "images_per_second": speed}
    log(args, "train", epoch=epoch, step=step, lr=lr, **terms, **latest)
    return latest


def save_checkpoint(args, model, optimizer, state):
    """Writes beside the old checkpoint and renames, so that there is a whole one at any moment."""
    path = Path(args.out, "checkpoint.pt")
    parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}
    with open(path.with_suffix(".part"), "wb") as file:  # whose errors are clearer than torch's
        torch.save({"settings": vars(args), **parts}, file)
    os.replace(path.with_suffix(".part"), path)


def load_checkpoint(args, model, optimizer):
    """Restores model and optimizer, if there is a checkpoint, and returns its state. Raises Failure
    if it is damaged or of other settings."""
    path = Path(args.out, "checkpoint.pt")
    if not path.exists():
        return {"epochs": 0, "seconds": 0.0}
    # With more epochs the rate follows their longer schedule from here on.
    may_change = ("epochs", "labels", "workers", "compile", "precision", "data_dir", "out")
    kept = [name for name in vars(args) if name not in may_change]
    try:
        if zipfile.ZipFile(path).testzip():  # torch.load does not compare checksums
            raise zipfile.BadZipFile
        saved = torch.load(path, map_location="cpu", weights_only=True)
        changed = [name for name in kept if saved["settings"].get(name) != getattr(args, name)]
        if not changed:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            return saved["state"]
    except Exception as error:  # damaged files raise many kinds
        raise Failure(f"cannot load {path} ({type(error).__name__}): name another --out") from None
    raise Failure(f"{path} was made with another {', '.join(changed)}: name another --out")


def parse_arguments(argv=None):
    """The flags, completed by the recipe. Bad ones exit with 2."""
    description = "Trains and judges a network by Barlow Twins."
    parser = argparse.ArgumentParser(description=description, usage=argparse.SUPPRESS)
    add = parser.add_argument
    add("--data", default="shapes", help="shapes, cifar10 or a folder with train/CLASS, val/CLASS")
    add("--recipe", choices=RECIPES, help="default: small, or resnet50 for a folder")
    add("--out", help="where to write and to go on, default: runs/DATA-RECIPE")
    add("--precision", choices=["fp32", "bf16"], help="default: bf16 where it is fast")
    add("--compile", action="store_true", help="torch.compile the network")
    choices = {"arch": ["small", *models.list_models(models, "*resn*")]}  # and ResNeXt
    choices |= {"optimizer": ["lars", "sgd"], "redundancy": ["cross", "auto"]}
    for name, (*values, meaning) in SETTINGS.items():
        flag = "--" + name.replace("_", "-")
        by_recipe = ", ".join(f"{r} {v}" for r, v in zip(RECIPES, values, strict=True))
        add(flag, type=type(values[0]), choices=choices.get(name), help=f"{meaning} ({by_recipe})")
    args = parser.parse_args(argv)
    built_in = args.data in ("shapes", "cifar10")
    if not built_in:
        args.data = str(Path(args.data).resolve())
    args.recipe = args.recipe or ("small" if built_in else "resnet50")
    args.from_files = args.recipe == "resnet50" and args.data != "shapes"
    args.out = args.out or f"runs/{Path(args.data).name}-{args.recipe}"
    if DEVICE.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:  # torch.cpu.get_capabilities is there since torch 2.11
        bf16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    args.precision = args.precision or ("bf16" if bf16 else "fp32")
    bounds = {"epochs": 1, "batch_size": 2, "size": 8, "labels": 10}  # of the others: 0
    for name, values in SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[RECIPES.index(args.recipe)])
        value = getattr(args, name)
        least = bounds.get(name, 0)
        if not isinstance(value, str) and not least <= value < math.inf:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} must be finite and at least {least}, not {value}")
    if not 0 < args.crop_scale <= 1:
        parser.error(f"--crop-scale must be above 0 and at most 1, not {args.crop_scale}")
    if not re.fullmatch(r"[1-9]\d{0,4}(-[1-9]\d{0,4})*", args.projector):
        parser.error(f"--projector must be widths like 512-512-512, not {args.projector}")
    return args


def main(argv=None):
    """Trains and judges. Prints a Failure as one sentence and exits with 1."""
    args = parse_arguments(argv)
    try:
        if DEVICE.type == "cuda":
            local_rank = int(os.environ.get("LOCAL_RANK", 0))
            if local_rank >= torch.cuda.device_count():
                raise Failure(f"there is no GPU for process {local_rank}: lower --nproc-per-node")
            torch.cuda.set_device(local_rank)
        backend = "nccl" if DEVICE.type == "cuda" else "gloo"
        if "RANK" in os.environ:  # started by torchrun
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        first = dist.get_rank() == 0
        train_set, whole_set, val_set = load_data(args)
        Path(args.out).mkdir(parents=True, exist_ok=True)
        model, state = train(args, train_set, whole_set, val_set)
        dist.destroy_process_group()  # the rest is for one; SyncBatchNorm is BatchNorm now
        if first:
            weights = {name: x.cpu() for name, x in model.backbone.state_dict().items()}
            with open(Path(args.out, "backbone.pt"), "wb") as file:
                torch.save(weights, file)
            judge(args, model, whole_set, val_set, state)
            draw_pictures(args, model, train_set)
            print(f"{args.out} holds backbone.pt, checkpoint.pt, log.jsonl and two pictures")
    except (Failure, OSError) as error:
        # read_image fails in a DataLoader's worker, whose traceback ends with the sentence.
        sentence = str(error).strip().split("\n")[-1].removeprefix("OSError: ")
        print(f"barlow_twins.py: {sentence}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except RuntimeError as error:
        if "by peer" not in str(error):
            raise
        raise SystemExit(1) from None  # gloo lost another process, which has said why it failed
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
