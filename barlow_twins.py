"""Barlow Twins (Zbontar et al. 2021, https://arxiv.org/abs/2103.03230) in one file.

Two augmented views of every image go through one network. Each unit of the embedding is
standardized over the batch, and C, the cross-correlation matrix of the two batches of embeddings,
is driven towards the identity: its diagonal asks that both views of an image get one embedding,
the rest that no unit repeats another. There are no negative pairs, no momentum encoder and no
stop-gradient. After training the projector is thrown away and the backbone is kept.

    loss = sum_i (1 - C_ii)^2 + lambda * sum_{i != j} C_ij^2

In the paper    Here
X               images, uint8 (N, 3, H, W)
T, T'           augment_a, augment_b
Y^A, Y^B        view_a, view_b, float (N, 3, size, size)
f               net: the backbone makes representations (N, d), the projector embeddings of them
Z^A, Z^B        z_a, z_b, embeddings (N, D)
C               cross_correlation(z_a, z_b), (D, D)
lambda, N, D    lambd, the batch size, the last width of the projector

    torchrun barlow_twins.py                                        # built-in data, a minute
    torchrun barlow_twins.py --data cifar10 --recipe quick          # CIFAR-10 on a CPU
    torchrun --nproc-per-node 8 barlow_twins.py --data IMAGENET     # the paper's recipe
"""

import argparse
import json
import math
import os
import random
import re
import time
import warnings
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, DistributedSampler
from torchvision import datasets, models
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

# ---------------------------------------------------------------------------------------- Loss


def standardize(z_a, z_b):
    """Both (N, D) in float32 or more, each unit with mean 0 and its variance v turned into
    v / (v + 1e-5), as by BatchNorm without parameters: a constant unit becomes 0. Raises ValueError
    unless both are (N, D) with N of 2 or more."""
    if z_a.shape != z_b.shape or z_a.ndim != 2 or len(z_a) < 2:
        raise ValueError(f"embeddings are (N, D), N of 2 or more, not {z_a.shape}, {z_b.shape}")
    dtype = torch.promote_types(z_a.dtype, torch.float32)
    return [F.batch_norm(z.to(dtype), None, None, training=True) for z in (z_a, z_b)]


def cross_correlation(z_a, z_b):
    """C, (D, D), the correlations of the units of z_a, (N, D), with those of z_b, (N, D) (paper,
    equation 2). Training only needs sums over it: see `loss_terms`."""
    with torch.autocast(z_a.device.type, enabled=False):
        a, b = standardize(z_a, z_b)
        return a.T @ b / len(a)


def barlow_twins_loss(z_a, z_b, lambd=0.0051, redundancy="cross"):
    """The loss of a whole batch, a scalar (paper, equation 1). For the arguments and errors see
    `loss_terms`, which `train` calls itself, to log them."""
    invariance_term, redundancy_term = loss_terms(z_a, z_b, redundancy)
    return invariance_term + lambd * redundancy_term


def loss_terms(z_a, z_b, redundancy="cross"):
    """The two sums of the loss, sum_i (1 - C_ii)^2 and sum_{i != j} C_ij^2, as scalars.

    z_a, z_b: (N, D), the embeddings of the two views; row n of both belongs to image n.
    redundancy: "cross" sums over C, "auto" over the autocorrelation of z_a, as the information
        bottleneck asks for (paper, appendix A).
    Raises ValueError for another redundancy, and as `standardize` does."""
    if redundancy not in ("cross", "auto"):
        raise ValueError(f'redundancy is "cross" or "auto", not {redundancy!r}')
    with torch.autocast(z_a.device.type, enabled=False):
        a, b = standardize(z_a, z_b)
        n, d = a.shape
        diagonal = (a * b).mean(0)
        invariance_term = (1 - diagonal).square().sum()
        if redundancy == "auto":
            b, diagonal = a, a.square().mean(0)
        if d <= n:
            c = a.T @ b / n
            redundancy_term = c.fill_diagonal_(0).square().sum()
        else:
            # Every recipe comes here. ||A^T B||^2 = tr(B^T A A^T B) = <A A^T, B B^T>: two N x N
            # Gram matrices give the sum over the larger D x D matrix, which is never made (Garrido
            # et al. 2022, arXiv 2206.02574).
            squares = ((a @ a.T) * (b @ b.T)).sum() / n**2
            redundancy_term = squares - diagonal.square().sum()
    return invariance_term, redundancy_term


def gather_batch(z):
    """The embeddings of the whole batch: (n, D) per process -> (W * n, D) on each of W processes.
    If all compute the same loss of it under DistributedDataParallel, the gradients are those of one
    process with the whole batch, as far as BatchNorm layers are synchronized. n must be the same
    everywhere. Without a process group it returns z."""
    if not dist.is_initialized():
        return z
    z, world_size = z.contiguous(), dist.get_world_size()
    parts = [torch.empty_like(z) for _ in range(world_size)]
    dist.all_gather(parts, z.detach())
    parts[dist.get_rank()] = z  # the only part with a gradient
    batch = torch.cat(parts)
    if batch.requires_grad:
        # DistributedDataParallel will average what the processes should add: hence the factor.
        batch.register_hook(lambda grad: grad * world_size)
    return batch


# ------------------------------------------------------------------------------------- Network

RESNETS = models.list_models(include=["resnet*", "resnext*", "wide_resnet*"])


def small_backbone():
    """Four convolutions for CPUs, (N, 3, H, W) -> (N, 1024). The first is not learned: cosines over
    rows, columns and colours decorrelate the pixels of a patch, much as the whitening that is the
    first layer of Jordan 2024 (arXiv 2404.00498)."""
    cosines = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]])
    patterns = torch.einsum("ic,jy,kx->ijkcyx", cosines, cosines, cosines)  # by frequencies
    gray = patterns[0].flatten(0, 1)
    colours = patterns[1:, [0, 0, 1], [0, 1, 0]].flatten(0, 1)  # the smoothest three of each
    filters = torch.cat([gray, colours, -gray, -colours])  # both signs, since a ReLU follows
    first = Conv2dNormActivation(3, 30, norm_layer=partial(nn.BatchNorm2d, affine=False))
    first[0].weight = nn.Parameter(filters, requires_grad=False)
    return nn.Sequential(
        first,
        nn.AvgPool2d(2),
        Conv2dNormActivation(30, 64, stride=2),
        Conv2dNormActivation(64, 128, stride=2),
        Conv2dNormActivation(128, 256),
        nn.AdaptiveAvgPool2d(2),  # 1 x 1 would lose where things are
        nn.Flatten(),
        nn.BatchNorm1d(1024, affine=False),
    )


def make_backbone(arch, small_images):
    """The backbone without a classifier, (N, 3, H, W) -> (N, d), and d."""
    if arch == "small":
        return small_backbone(), 1024
    if arch not in RESNETS:
        raise ValueError(f"arch is one of small, {', '.join(RESNETS)}, not {arch!r}")
    backbone = models.get_model(arch, zero_init_residual=True)
    d, backbone.fc = backbone.fc.in_features, nn.Identity()
    if small_images:
        backbone.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        backbone.maxpool = nn.Identity()
    return backbone, d


class BarlowTwins(nn.Module):
    """Backbone and projector (paper, section 2.2), applied to one view after the other.

    arch: "small", see `small_backbone`, or the name of a torchvision ResNet.
    projector: widths of its layers, such as "8192-8192-8192"; the last one is D.
    small_images: 3x3 stem without max-pool (SimCLR, arXiv 2002.05709, appendix B.9).
    forward: two views (N, 3, H, W) -> two embeddings (N, D).
    Raises ValueError for an unknown arch or a malformed projector."""

    def __init__(self, arch="resnet18", projector="2048-2048-2048", small_images=True):
        super().__init__()
        if not re.fullmatch(r"[1-9]\d{0,4}(-[1-9]\d{0,4})*", projector):
            raise ValueError(f"projector is made of widths like 512-512-512, not {projector!r}")
        self.backbone, d = make_backbone(arch, small_images)
        *hidden, last = map(int, projector.split("-"))
        layers = []
        for width in hidden:
            layers += [nn.Linear(d, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
            d = width
        self.projector = nn.Sequential(*layers, nn.Linear(d, last, bias=False))

    def forward(self, view_a, view_b):
        return self.projector(self.backbone(view_a)), self.projector(self.backbone(view_b))


# --------------------------------------------------------------------------------------- Views
# The operations are torchvision's, but for a batch with a factor of its own for each image, and on
# the device that trains. Constants are numbers, because a tensor of them would wait for the GPU.

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as torchvision's models use


def normalize(images):
    """uint8 or [0, 1] float (N, 3, H, W) -> float (N, 3, H, W), as the backbone wants them."""
    x = TF.to_dtype(images, torch.float32, scale=True)
    return torch.stack([(x[:, i] - MEAN[i]) / STD[i] for i in range(3)], dim=1)


def crop_boxes(n, height, width, scale, device="cpu"):
    """n boxes (n, 4), as RandomResizedCrop draws them: top, left, height, width in pixels."""
    area = height * width * torch.empty(n, 10, device=device).uniform_(*scale)
    ratio = torch.empty_like(area).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    # The first of ten draws that fits into the image; if none does, what of the first lies in it.
    first = ((h <= height) & (w <= width)).int().argmax(1, keepdim=True)
    h, w = h.gather(1, first).clamp(1, height), w.gather(1, first).clamp(1, width)
    top = (torch.rand_like(h) * (height - h + 1)).floor()
    left = (torch.rand_like(w) * (width - w + 1)).floor()
    return torch.cat([top, left, h, w], dim=1)


def resize_weights(start, length, size, total):
    """Matrices (N, size, total) that resize the stretches of `total` pixels that begin at start and
    have a length, both (N, 1, 1), by the triangles of antialiased bilinear interpolation."""
    scale = length / size
    centre = start + scale * (torch.arange(size, device=start.device).view(-1, 1) + 0.5)
    pixel = torch.arange(total, device=start.device) + 0.5
    weights = (1 - (pixel - centre).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixel > start) & (pixel < start + length))
    return weights / weights.sum(-1, keepdim=True)


def resized_crop(x, boxes, size):
    """The boxes (N, 4) of the images x (N, 3, H, W), resized: (N, 3, size, size)."""
    n, c, height, width = x.shape
    top, left, h, w = boxes.view(n, 4, 1, 1).unbind(1)
    rows, columns = resize_weights(top, h, size, height), resize_weights(left, w, size, width)
    x = x.view(n, c * height, width) @ columns.mT
    return rows.unsqueeze(1) @ x.view(n, c, height, size)


def adjust_brightness(x, factor):
    """x (N, 3, H, W) in [0, 1], factor (N, 1, 1, 1) -> (N, 3, H, W); so do the next three."""
    return (x * factor).clamp_(0, 1)


def adjust_contrast(x, factor):
    mean = TF.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True)
    return torch.lerp(mean, x, factor).clamp_(0, 1)


def adjust_saturation(x, factor):
    return torch.lerp(TF.rgb_to_grayscale(x), x, factor).clamp_(0, 1)


def adjust_hue(x, factor):
    value = x.amax(1, keepdim=True)
    chroma = value - x.amin(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    # In sixths of the colour circle red lies at 0, green at 2, blue at 4.
    hue = torch.where(value == g, 2 * chroma + b - r, 4 * chroma + r - g)
    hue = torch.where(value == r, g - b, hue) / chroma.clamp(min=1e-12) + 6 * factor
    # Within 1 of its own hue a channel has the full value, at a distance of 2 value - chroma. (In
    # place, since new memory costs a CPU most of the time.)
    distance = hue - torch.arange(0, 6, 2, device=x.device).view(3, 1, 1)
    distance.sub_((distance / 6).round_(), alpha=6).abs_()
    return torch.addcmul(value, chroma, distance.sub_(1).clamp_(0, 1), value=-1)


def color_jitter(x):
    """v2.ColorJitter(0.4, 0.4, 0.2, 0.1) with factors for each image and one order a batch."""
    operations = [
        (adjust_brightness, 0.6, 1.4),
        (adjust_contrast, 0.6, 1.4),
        (adjust_saturation, 0.8, 1.2),
        (adjust_hue, -0.1, 0.1),
    ]
    for i in torch.randperm(4).tolist():
        adjust, low, high = operations[i]
        x = adjust(x, x.new_empty(len(x), 1, 1, 1).uniform_(low, high))
    return x


def gaussian_blur(x, sigma):
    """Blurs x (N, 3, H, W) by sigma (N, 1) pixels, kernel of 23 (BYOL, 2006.07733, appendix B)."""
    n, c, height, width = x.shape
    radius = min(11, height - 1, width - 1)
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.softmax(-0.5 * (taps / sigma).square(), dim=1)
    kernel = kernel.repeat_interleave(c, dim=0).view(n * c, 1, 1, -1)
    x = F.pad(x, [radius] * 4, mode="reflect").view(1, n * c, height + 2 * radius, -1)
    x = F.conv2d(F.conv2d(x, kernel, groups=n * c), kernel.mT, groups=n * c)
    return x.view(n, c, height, width)


class Augment(nn.Module):
    """One of the two distributions of augmentations, T or T' (paper, section 2.1; BYOL, app. B):
    uint8 (N, 3, H, W) -> normalized float (N, 3, size, size), where each image draws for itself.
    scale: least and largest part of it in a crop, None for crops. blur, solarize: probabilities."""

    def __init__(self, size, scale=(0.08, 1.0), blur=0.0, solarize=0.0):
        super().__init__()
        self.size, self.scale, self.blur, self.solarize = size, scale, blur, solarize

    def forward(self, images):
        n, _, height, width = images.shape
        x = TF.to_dtype(images, torch.float32, scale=True)
        if self.scale:
            x = resized_crop(x, crop_boxes(n, height, width, self.scale, x.device), self.size)
        coin = torch.rand(5, n, 1, 1, 1, device=x.device)
        x = torch.where(coin[0] < 0.5, x.flip(3), x)
        x = torch.where(coin[1] < 0.8, color_jitter(x), x)
        x = torch.where(coin[2] < 0.2, TF.rgb_to_grayscale(x), x)
        if self.blur:
            sigma = x.new_empty(n, 1).uniform_(0.1, 2.0)
            x = torch.where(coin[3] < self.blur, gaussian_blur(x, sigma), x)
        if self.solarize:
            x = torch.where(coin[4] < self.solarize, torch.minimum(x, 1 - x), x)  # from 0.5 on
        return normalize(x)


# ----------------------------------------------------------------------------------- Optimizer


class LARS(torch.optim.Optimizer):
    """SGD with momentum and steps in proportion to the norm of each layer's weights w:

        g <- g + weight_decay * w
        m <- momentum * m + g * eta * |w| / |g|
        w <- w - lr * m

    (You et al. 2017, arXiv 1708.03888; paper, section 2.2.) Vectors (biases, BatchNorm) get neither
    the decay nor the factor, which is 1 where either norm is 0."""

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
                    ratio = group["eta"] * w.norm() / g.norm()
                    g = g * torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
                m = group["momentum"] * self.state[w].get("momentum", 0.0) + g
                self.state[w]["momentum"] = m
                w.add_(m, alpha=-group["lr"])


def learning_rate(step, steps, warmup):
    """Fraction of the peak rate: linear from 0 over `warmup` steps, then half a cosine from 1
    towards 0.001 after the last of `steps` steps (paper, section 2.2)."""
    if step < warmup:
        return step / warmup
    cosine = 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (steps - warmup))
    return cosine + 0.001 * (1 - cosine)


# Fused, since otherwise AdamW makes temporaries as large as all the parameters.
OPTIMIZERS = {"adamw": partial(torch.optim.AdamW, fused=True), "lars": LARS}

# ------------------------------------------------------------------------------------ Training


class Failure(Exception):
    """One sentence for the user: what is wrong and what to do. `main` prints it and exits."""


def build(args, device):
    """The seeded model, the same wrapped for several processes, its optimizer, T and T'."""
    torch.manual_seed(args.seed)
    model = BarlowTwins(args.arch, args.projector, args.small_images)
    model.to(device, memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    net = model
    if dist.is_initialized():
        if device.type == "cuda":  # on CPUs BatchNorm sees the images of its own process only
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        net = nn.parallel.DistributedDataParallel(model)
    # Biases and BatchNorm get no decay and, in `train`, a rate of their own.
    weights = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": weights, "weight_decay": args.weight_decay}, {"params": vectors}]
    optimizer = OPTIMIZERS[args.optimizer](groups, lr=0.0, weight_decay=0.0)
    scale = None if args.from_files else (args.crop_scale, 1.0)
    chances = zip(args.blur, args.solarize, strict=True)
    augment_a, augment_b = (Augment(args.size, scale, *pair) for pair in chances)
    return model, net, optimizer, augment_a, augment_b


def save(state, path):
    """Writes beside the old file and renames, so that at any moment there is a whole one."""
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def load(path):
    """The dict in a file of torch.save, none of its code run. Raises Failure if that fails."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what foreign files make torch suspect
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # damaged files raise many kinds
        raise Failure(f"cannot load {path} ({type(error).__name__}): name another file") from None


def log(folder, event, **values):
    """Appends a line to log.jsonl in the folder, which it makes if need be, and prints the same."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.jsonl", "a") as file:
        file.write(json.dumps({"event": event, **values}) + "\n")
    texts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
    print(f"{event}:", ", ".join(texts), flush=True)


def train(args, device):
    """Trains and judges a network. Raises Failure for whatever keeps it from going on."""
    out, size = Path(args.out), args.batch_size
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    images, labelled = load_data(args, device)
    steps = len(images) // size
    if size % world_size or size < 2 * world_size or steps == 0:
        limits = f"a multiple of the number of processes, {world_size}, at least 2 for each, and"
        raise Failure(f"--batch-size {size} must be {limits} at most that of images, {len(images)}")
    model, net, optimizer, augment_a, augment_b = build(args, device)
    # Whatever stops a run, the same command goes on from the last epoch, if these are the same.
    checkpoint = out / "checkpoint.pt"
    fixed = "data recipe size arch projector optimizer weight_decay batch_size seed"
    settings = {key: vars(args)[key] for key in fixed.split()}
    state = {"settings": settings, "epoch": 0, "seconds": 0.0}
    if checkpoint.exists():
        state = load(checkpoint)
        changed = [key for key in settings if state.get("settings", {}).get(key) != settings[key]]
        if changed:
            raise Failure(f"{checkpoint} is of another {', '.join(changed)}: name another --out")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    if rank == 0:
        log(out, "config", **vars(args), processes=world_size, torch=torch.__version__)
        images_a, images_b = next(batches(images, [torch.arange(len(images))[:256]], device, 0))
        first_views = augment_a(images_a), augment_b(images_b)
        draw_views(out / "views.png", first_views)
    warmup = round(min(10, args.epochs / 10) * steps)
    peaks = [lr * size / 256 for lr in (args.lr_weights, args.lr_biases)]
    sampler = DistributedSampler(images, world_size, rank, seed=args.seed, drop_last=True)
    for epoch in range(state["epoch"], args.epochs):
        # All randomness of an epoch follows from these two lines, so none of it need be saved.
        torch.manual_seed(hash((args.seed, epoch, rank)))  # of numbers, which is always the same
        sampler.set_epoch(epoch)
        order = torch.tensor(list(sampler), device=device).split(size // world_size)[:steps]
        terms, started = [], time.monotonic()
        loader = batches(images, order, device, args.workers)
        for step, (images_a, images_b) in enumerate(loader, start=1):
            fraction = learning_rate(epoch * steps + step - 1, args.epochs * steps, warmup)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * fraction
            view_a, view_b = augment_a(images_a), augment_b(images_b)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                z_a, z_b = net(view_a, view_b)
            z_a, z_b = gather_batch(z_a), gather_batch(z_b)
            invariance, redundancy = loss_terms(z_a, z_b, args.redundancy)
            loss = invariance + args.lambd * redundancy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            terms.append(torch.stack([loss, invariance, redundancy]).detach())
            # Only now and then, because to read the loss is to wait for the GPU.
            if rank == 0 and (step % 100 == 0 or step == steps):
                means = torch.stack(terms).mean(0).tolist()  # of the epoch so far
                if not math.isfinite(means[0] + nn.utils.get_total_norm(model.parameters())):
                    message = f"the loss is not finite in epoch {epoch + 1}: lower --lr-weights and"
                    raise Failure(f"{message} --lr-biases, then go on from the last checkpoint")
                values = dict(zip(("loss", "invariance", "redundancy"), means, strict=True))
                speed = step * size / (time.monotonic() - started)
                values |= dict(lr=peaks[0] * fraction, images_per_second=speed)
                log(out, "train", epoch=epoch + 1, step=step, **values)
        if rank == 0:
            state["seconds"] += time.monotonic() - started
            state |= dict(epoch=epoch + 1, loss=means[0], model=model.state_dict())
            state["optimizer"] = optimizer.state_dict()
            save(state, checkpoint)
            features = extract_features(model.backbone, labelled, device, args.workers, 2000)
            knn, dimensions = knn_accuracy(*features, k=20), effective_rank(features[2])
            log(out, "eval", epoch=epoch + 1, knn=knn, effective_rank=dimensions)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank > 0:
        return
    # BatchNorm has seen distorted views only: its statistics are taken again, of whole images.
    update_bn(whole_images(labelled[0], 10_000, device, args.workers), model.backbone)
    save({key: x.cpu() for key, x in model.backbone.state_dict().items()}, out / "backbone.pt")
    untrained, *_ = build(args, device)  # the seed makes the same weights again
    networks = {"_pixels": nn.Sequential(nn.AdaptiveAvgPool2d(32), nn.Flatten())}
    networks |= {"_untrained": untrained.backbone, "": model.backbone}
    scores, features = {}, {}
    for name, backbone in networks.items():
        features[name] = extract_features(backbone, labelled, device, args.workers)
        scores |= {key + name: score for key, score in judge(features[name]).items()}
    draw_correlation(out / "correlation.png", untrained, model, first_views)
    draw_neighbours(out / "neighbours.png", labelled, features["_untrained"], features[""])
    speed = state["epoch"] * steps * size / state["seconds"]
    result = dict(data=args.data, labels=len(labelled[1]), epochs=state["epoch"])
    result |= dict(seconds=state["seconds"], images_per_second=speed, loss=state["loss"])
    log(out, "result", **result, **scores, effective_rank=effective_rank(features[""][2]))


# ---------------------------------------------------------------------------------------- Data

# Each shape as a function of the plane that is negative inside; the shapes fill about [-1, 1]^2.
SHAPES = {
    "disk": lambda u, v: torch.hypot(u, v) - 0.85,
    "ring": lambda u, v: (torch.hypot(u, v) - 0.7).abs() - 0.2,
    "square": lambda u, v: torch.maximum(u.abs(), v.abs()) - 0.75,
    "frame": lambda u, v: (torch.maximum(u.abs(), v.abs()) - 0.65).abs() - 0.18,
    "triangle": lambda u, v: torch.maximum(v - 0.7, 0.87 * u.abs() - 0.5 * v - 0.43),
    "diamond": lambda u, v: u.abs() + v.abs() - 0.95,
    "star": lambda u, v: torch.hypot(u, v) - 0.62 - 0.33 * torch.cos(5 * torch.atan2(u, -v)),
    "moon": lambda u, v: torch.maximum(torch.hypot(u, v) - 0.9, 0.75 - torch.hypot(u - 0.45, v)),
    "bars": lambda u, v: torch.maximum((u.abs() - 0.55).abs() - 0.25, v.abs() - 0.9),
    "hourglass": lambda u, v: torch.maximum(v.abs() - 0.85, u.abs() - v.abs()),
}


def shapes(n, seed, size=32):
    """n images of the ten SHAPES, uint8 (n, 3, size, size), and their labels, int64 (n,). So much
    varies that pixels tell little about the class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(SHAPES), (n,), generator=generator)
    # Place (x, y), radius, darkest gray, contrast, and by its sign which side is dark.
    low = torch.tensor([-0.5, -0.5, 0.4, 0.1, 0.3, -1.0])
    high = torch.tensor([0.5, 0.5, 0.8, 0.4, 0.5, 1.0])
    drawn = low + (high - low) * torch.rand(n, 6, generator=generator)
    axis = (torch.arange(size) + 0.5) / size * 2 - 1
    images = torch.empty(n, 3, size, size, dtype=torch.uint8)
    for label, outline in enumerate(SHAPES.values()):
        i = labels == label
        x, y, radius, dark, contrast, sign = drawn[i].view(-1, 6, 1, 1, 1).unbind(1)
        distance = outline((axis - x) / radius, (axis.view(-1, 1) - y) / radius) * radius
        inside = (0.5 - sign.sign() * distance * size / 2).clamp(0, 1)  # soft edge
        tint = 0.06 * torch.rand(len(x), 3, 1, 1, generator=generator) - 0.03
        noise = 0.11 * torch.randn(len(x), 3, size, size, generator=generator)
        images[i] = (255 * (dark + contrast * inside + tint + noise)).clamp(0, 255).byte()
    return images, labels


class Folder(datasets.ImageFolder):
    """The images in CLASS/ folders, without their labels."""

    def __getitem__(self, index):
        try:
            return super().__getitem__(index)[0]
        except Exception as error:  # Pillow raises many kinds for damaged files
            raise Failure(f"cannot read the image {self.samples[index][0]}: {error}") from None


def two_crops(crop, image):
    """Two random crops of a PIL image, uint8 (2, 3, size, size)."""
    return torch.stack([TF.pil_to_tensor(crop(image)) for _ in range(2)])


def load_data(args, device):
    """Images to train on, and for the judges a tuple: training images, labels (n,) of the first n,
    validation images, labels (m,). Images are uint8 (N, 3, H, W) on the device, or with
    args.from_files data sets: of pairs of crops, (2, 3, size, size), to train on, of whole images
    for the judges. Raises Failure."""
    side = args.size if args.from_files else max(32, args.size)
    if args.data == "shapes":
        (train, train_y), (val, val_y) = shapes(20_000, 1, side), shapes(5_000, 2, side)
    elif args.data == "cifar10":
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        if not first:  # the first process of a machine downloads it, while the others wait
            dist.barrier()
        try:
            train, val = (datasets.CIFAR10(args.data_dir, t, download=True) for t in (True, False))
        except (OSError, RuntimeError) as error:
            hint = f"put cifar-10-python.tar.gz into {args.data_dir}, or use --data shapes"
            raise Failure(f"cannot get CIFAR-10 ({error}): {hint}") from None
        if first and dist.is_initialized():
            dist.barrier()
        train_y, val_y = torch.tensor(train.targets), torch.tensor(val.targets)
        train, val = (torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in (train, val))
    else:
        # For 224 pixels this is the usual "resize to 256, take the central 224".
        around = round(side * 8 / 7) if args.from_files else side
        bicubic = v2.InterpolationMode.BICUBIC
        whole = v2.Compose([v2.Resize(around, bicubic), v2.CenterCrop(side), v2.PILToTensor()])
        crop = v2.RandomResizedCrop(side, (args.crop_scale, 1.0), interpolation=bicubic)
        try:
            train, val = (Folder(Path(args.data, part), whole) for part in ("train", "val"))
            images = Folder(Path(args.data, "train"), partial(two_crops, crop))
        except OSError as error:
            wanted = "must be shapes, cifar10 or a folder with train/CLASS/* and val/CLASS/*"
            raise Failure(f"--data {args.data} {wanted}: {error}") from None
        if train.classes != val.classes:
            raise Failure(f"the folders train and val of {args.data} must hold the same classes")
        for part in (train, val, images):
            random.Random(0).shuffle(part.samples)  # on disk they lie class by class
        train_y, val_y = (torch.tensor([y for _, y in part.samples]) for part in (train, val))
        if not args.from_files:
            loaders = (DataLoader(part, 100, num_workers=args.workers) for part in (train, val))
            # Cloned, since each batch of a worker keeps a file descriptor open.
            train, val = (torch.cat([batch.clone() for batch in loader]) for loader in loaders)
    if not args.from_files:
        train, val = train.to(device), val.to(device)
        images = train
    return images, (train, train_y[: args.labels].to(device), val, val_y.to(device))


def batches(images, order, device, workers):
    """For each tensor of indices in `order` the images for both views, uint8 (n, 3, H, W) twice:
    two crops of each if the data set makes them, else the same images twice."""
    if torch.is_tensor(images):
        for i in order:
            yield (images[i.to(device)],) * 2
        return
    order, cuda = [i.tolist() for i in order], device.type == "cuda"
    for batch in DataLoader(images, batch_sampler=order, num_workers=workers, pin_memory=cuda):
        batch = batch.to(device, non_blocking=True)
        yield batch.unbind(1) if batch.ndim == 5 else (batch, batch)


def whole_images(images, n, device, workers):
    """The first n images in batches, float (500, 3, H, W), as the backbone wants them."""
    order = torch.arange(len(images))[:n].split(500)
    for batch, _ in batches(images, order, device, workers):
        yield normalize(batch)


# ---------------------------------------------------------------------------------- Evaluation


@torch.no_grad()
def extract_features(backbone, labelled, device, workers, most=None):
    """Features (n, d) and labels (n,) of the training images, then those of the validation images,
    (m, d) and (m,), each cut to `most`. For `labelled` see `load_data`."""
    result = []
    backbone.eval()
    for images, y in (labelled[:2], labelled[2:]):
        x = [backbone(x) for x in whole_images(images, len(y[:most]), device, workers)]
        result += [torch.cat(x), y[:most]]
    backbone.train()
    return result


def knn_accuracy(train_x, train_y, test_x, test_y, k=200, temperature=0.1):
    """Accuracy of a vote of the k nearest training images, weighted by exp(cosine / temperature)
    (Wu et al. 2018, arXiv 1805.01978, with 0.07). Features (N, d), labels (N,); (M, d), (M,)."""
    correct, train_x = 0, F.normalize(train_x)
    for x, y in zip(F.normalize(test_x).split(1000), test_y.split(1000), strict=True):
        similarity, nearest = (x @ train_x.T).topk(min(k, len(train_x)))
        votes = x.new_zeros(len(x), int(train_y.max()) + 1)
        votes.scatter_add_(1, train_y[nearest], (similarity / temperature).exp())
        correct += int((votes.argmax(1) == y).sum())
    return correct / len(test_y)


def linear_accuracy(train_x, train_y, test_x, test_y):
    """Accuracy of a linear probe: a logistic regression on features of mean 0 and mean variance 1
    with the penalty 0.005 |w|^2. Features (N, d), labels (N,); (M, d), (M,)."""
    mean, scale = train_x.mean(0), train_x.var(0).mean().sqrt().clamp(min=1e-12)
    train_x, test_x = (train_x - mean) / scale, (test_x - mean) / scale
    probe = nn.Linear(train_x.shape[1], int(train_y.max()) + 1, device=train_x.device)
    nn.init.zeros_(probe.weight)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(train_x), train_y) + 0.005 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float((probe(test_x).argmax(1) == test_y).float().mean())


def judge(features):
    """Both accuracies; kNN with k = 200, or a fiftieth of the labels if that is less."""
    k = max(1, min(200, len(features[1]) // 50))
    return {"knn": knn_accuracy(*features, k), "linear": linear_accuracy(*features)}


def effective_rank(x):
    """How many dimensions the features (N, d) fill: RankMe (Garrido et al. 2023, 2210.02885)."""
    singular_values = torch.linalg.eigvalsh(x.double().T @ x.double()).clamp(min=0).sqrt()
    return float(torch.special.entr(F.normalize(singular_values, p=1, dim=0)).sum().exp())


def evaluate(args, device):
    """Judges the backbone in args.evaluate: `backbone.pt`, `checkpoint.pt`, a file of the authors
    or the state dict of any torchvision ResNet. The architecture is the one that fits."""
    weights = load(Path(args.evaluate))
    weights = {
        re.sub(r"^(module\.)?(backbone\.)?", "", key): value
        for key, value in weights.get("model", weights).items()
        if not re.match(r"(module\.)?(projector|bn|fc)\.", key)
    }
    for arch, small_images in product(["small", *RESNETS], [True, False]):
        with torch.device("meta"):
            backbone, _ = make_backbone(arch, small_images)
        with suppress(RuntimeError):  # which says that the weights do not fit
            backbone.load_state_dict(weights, assign=True)
            break
    else:
        raise Failure(f"{args.evaluate} holds neither the small backbone nor a torchvision ResNet")
    backbone.to(device, memory_format=torch.channels_last)
    features = extract_features(backbone, load_data(args, device)[1], device, args.workers)
    scores = judge(features) | {"effective_rank": effective_rank(features[2])}
    origin = dict(file=args.evaluate, data=args.data, labels=len(features[1]))
    log(Path(args.out), "evaluation", **origin, **scores)


# ------------------------------------------------------------------------------------ Pictures


def save_grid(images, path, columns):
    """Writes floats (N, 3, H, W) in [0, 1], with sides of at least 64 pixels."""
    images = TF.resize(images.cpu(), [max(64, images.shape[-1])] * 2, v2.InterpolationMode.NEAREST)
    save_image(images, path, nrow=columns, pad_value=1.0)


def draw_views(path, views):
    """Pairs of views of the first 32 images."""
    pairs = torch.stack(views, dim=1)[:32].flatten(0, 1).cpu()
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (STD, MEAN))
    save_grid(pairs * std + mean, path, columns=8)


@torch.no_grad()
def draw_correlation(path, untrained, trained, views):
    """C of the first 256 units before and after training: blue is -1, white 0, red 1."""
    c = torch.stack([cross_correlation(*net(*views))[:256, :256] for net in (untrained, trained)])
    colours = torch.stack([1 + c.clamp(max=0), 1 - c.abs(), 1 - c.clamp(min=0)], dim=1)
    save_grid(colours, path, columns=2)


def draw_neighbours(path, labelled, untrained, trained):
    """Ten validation images, each with its five nearest training images by the features of the
    untrained and of the trained network, in green where the class is the same and in red else."""
    images, y, val, val_y = labelled
    cells, nearest = [], []
    for x, _, val_x, _ in (untrained, trained):
        nearest.append((F.normalize(val_x[:10]) @ F.normalize(x).T).topk(5).indices)
    for i, neighbours in enumerate(torch.cat(nearest, dim=1).tolist()):
        cells.append(TF.pad(val[i], 2, 255))
        for j in neighbours:
            colour = (0, 200, 0) if y[j] == val_y[i] else (255, 0, 0)
            cells.append(TF.pad(images[j], 2, colour))
    save_grid(torch.stack(cells) / 255, path, columns=11)


# -------------------------------------------------------------------------------- Command line


def within(kind, low, high=1e9):
    """A type for argparse: a finite number within these bounds."""

    def number(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be from {low:g} to {high:g}, not {text}")
        return value

    return number


positive, share = within(float, 1e-12, 1e30), within(float, 0, 1)
RECIPES = "shapes", "quick", "cifar10", "imagenet"
SETTINGS = {  # the type, the meaning, the values in these recipes (why: .github/measured.md)
    "arch": (str, "small or any torchvision ResNet", "small", "small", "resnet18", "resnet50"),
    "projector": (str, "layer widths", "512-512", "512-512", "2048-2048-2048", "8192-8192-8192"),
    "epochs": (within(int, 1), "passes over the images", 5, 18, 200, 1000),
    "batch_size": (within(int, 2), "images of all processes together", 128, 128, 256, 2048),
    "optimizer": (str, "adamw or lars", "adamw", "adamw", "adamw", "lars"),
    "lr_weights": (positive, "peak learning rate for batches of 256", 8e-3, 6e-3, 2e-3, 0.2),
    "lr_biases": (positive, "the same for biases and BatchNorm", 8e-3, 6e-3, 2e-3, 0.0048),
    "weight_decay": (within(float, 0), "decay of the weights", 0.0, 0.0, 1e-4, 1.5e-6),
    "lambd": (within(float, 0), "weight of the redundancy term", 0.01, 0.01, 0.0051, 0.0051),
    "redundancy": (str, "cross or auto, see appendix A", "auto", "auto", "cross", "cross"),
    "size": (within(int, 8), "side of a view in pixels", 20, 24, 32, 224),
    "crop_scale": (within(float, 1e-6, 1), "least part of an image in a view", 0.4, 0.4, 0.2, 0.08),
    "blur": (share, "probabilities in T and T'", (0, 0), (0, 0), (0, 0), (1, 0.1)),
    "solarize": (share, "probabilities in T and T'", (0, 0.2), (0, 0.2), (0, 0.2), (0, 0.2)),
    "labels": (within(int, 2), "training labels for the judges", 1000, 50_000, 50_000, 50_000),
}  # fmt: skip


def parse_arguments(argv=None):
    """The flags, completed by the recipe. Bad ones exit with 2."""
    parser = argparse.ArgumentParser(description="Trains or judges a network by Barlow Twins.")
    parser.error = lambda message: parser.exit(2, f"barlow_twins.py: {message}\n")
    add = parser.add_argument
    add("--data", default="shapes", help="shapes, cifar10 or a folder with train/CLASS, val/CLASS")
    add("--recipe", choices=RECIPES, help="default: shapes, cifar10, or imagenet for a folder")
    add("--data-dir", default="data", help="where CIFAR-10 is, or is downloaded to")
    add("--out", help="where to write and to go on, shared by all machines (runs/NAME)")
    for name, (kind, meaning, *values) in SETTINGS.items():
        flag, nargs = "--" + name.replace("_", "-"), 2 if isinstance(values[0], tuple) else None
        by_recipe = ", ".join(f"{r} {v}" for r, v in zip(RECIPES, values, strict=True))
        choices = {"optimizer": OPTIMIZERS, "redundancy": ["cross", "auto"]}.get(name)
        add(flag, type=kind, nargs=nargs, choices=choices, help=f"{meaning} ({by_recipe})")
    workers = os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    add("--workers", type=within(int, 0), default=workers, help="to read files, for each process")
    add("--seed", type=within(int, 0), default=0)
    add("--compile", action="store_true", help="torch.compile the network")
    add("--precision", choices=["fp32", "bf16"], help="default: bf16 where it is fast")
    add("--evaluate", metavar="FILE", help="judge the backbone in a file instead, in one process")
    args = parser.parse_args(argv)
    built_in = args.data in ("shapes", "cifar10")
    args.recipe = args.recipe or (args.data if built_in else "imagenet")
    args.out = args.out or f"runs/{Path(args.data).resolve().name}"
    for key, (_, _, *values) in SETTINGS.items():
        if getattr(args, key) is None:
            setattr(args, key, values[RECIPES.index(args.recipe)])
    args.small_images = args.recipe != "imagenet"
    args.from_files = not built_in and not args.small_images  # else they are kept in memory
    bf16 = torch.cpu.get_capabilities().get("avx512_bf16")
    if torch.cuda.is_available():
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    args.precision = args.precision or ("bf16" if bf16 else "fp32")
    try:
        with torch.device("meta"):
            BarlowTwins(args.arch, args.projector, args.small_images)
    except ValueError as error:
        parser.error(error)
    return args


def main(argv=None):
    args, device = parse_arguments(argv), torch.device("cpu")
    try:
        if torch.cuda.is_available():
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if device.index >= torch.cuda.device_count():
                raise Failure(f"there is no GPU for process {device.index}: lower --nproc-per-node")
            torch.cuda.set_device(device)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        (evaluate if args.evaluate else train)(args, device)
    except (Failure, OSError) as failure:
        # From a DataLoader's worker it comes wrapped in the worker's traceback.
        sentence = str(failure).rsplit("Failure: ")[-1].strip()
        raise SystemExit(f"barlow_twins.py: {sentence}") from None


if __name__ == "__main__":
    main()
