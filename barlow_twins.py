"""Barlow Twins (Zbontar et al. 2021, https://arxiv.org/abs/2103.03230) in one file.

Two random views of every image go through one network. Each unit of the embedding is standardized
over the batch, and C, the cross-correlation matrix of the embeddings of the two views, is driven
towards the identity: the diagonal asks each unit to say the same of both views, the rest asks that
no two units say the same. It needs no negative pairs, momentum encoder or stop-gradient.

    loss = sum_i (1 - C_ii)^2 + lambda * sum_{i != j} C_ij^2        (equation 1)

In the paper    Here
X               images, uint8 (N, 3, H, H), H is image_size
T               augment, called twice, with different probabilities of blur and solarization
Y^A, Y^B        view_a, view_b, float (N, 3, size, size)
f               model: a backbone, whose output is the representation (N, R), then a projector
Z^A, Z^B        z_a, z_b, the embeddings (N, D) that leave the projector
C, lambda       cross_correlation(z_a, z_b), (D, D); lambd

    torchrun barlow_twins.py                                         # drawings, 2 minutes
    torchrun barlow_twins.py --data cifar10                          # CIFAR-10, 5 minutes
    torchrun barlow_twins.py --data cifar10 --recipe resnet18        # ... on a GPU
    torchrun --nproc-per-node 8 barlow_twins.py --data imagenet/ --recipe resnet50

After every epoch a run writes a checkpoint, from which the same command goes on. In the end the
projector is thrown away, and the backbone is judged by a linear probe and by kNN. Every function
stands below those that it calls; `train`, near the end, puts them together.
"""

import argparse
import json
import math
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset, default_collate
from torchvision import datasets, models
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF
from torchvision.utils import save_image

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL_SIDE = 64  # pixels: up to here images are kept in memory, and ResNets get a stem for them

# ------------------------------------------------------------------------------------- Recipes
# small: for any CPU, found by trying (.github/measured.md).
# resnet18: for CIFAR-10 on a GPU, as in lightly's benchmark.
# resnet50: for ImageNet, as in the authors' code. Our gradient is 16 times theirs, which is the
#   mean of the parts of 16 GPUs, not their sum. So the decay is 1e-6 * 16 and the rate of vectors
#   0.0048 / 16. The rate of weights stays: LARS divides by their gradient's norm.

RECIPES = ("small", "resnet18", "resnet50")
# fmt: off
SETTINGS = {
    #                small          resnet18     resnet50          meaning
    "arch":         ("small",       "resnet18",  "resnet50",       "small or a torchvision ResNet"),
    "projector":    ("512-512-512", "2048-2048", "8192-8192-8192", "widths of its layers"),
    "lambd":        (0.01,          0.005,       0.0051,           "weight of the second sum"),
    "image_size":   (32,            32,          256,              "side of an image in pixels"),
    "size":         (16,            32,          224,              "side of a view in pixels"),
    "crop_scale":   (0.4,           0.08,        0.08,             "least part of image shown"),
    "epochs":       (7,             200,         1000,             "passes over the images"),
    "batch_size":   (128,           512,         2048,             "images of all processes"),
    "optimizer":    ("lars",        "sgd",       "lars",           "lars or sgd; set its rates"),
    "lr_weights":   (10.0,          0.12,        0.2,              "peak rate for batches of 256"),
    "lr_biases":    (0.1,           0.12,        0.0003,           "... for BatchNorm's vectors"),
    "weight_decay": (0.0,           5e-4,        1.6e-5,           "weight decay"),
    "labels":       (10_000,        50_000,      50_000,           "training labels to judge with"),
    "workers":      (0,             0,           8,                "processes that read images"),
}
# fmt: on


# ---------------------------------------------------------------------------------------- Loss
def cross_correlation(z_a, z_b):
    """C, float32 (D, D) from -1 to 1, of embeddings (N, D) and (N, D) (equation 2)."""
    if z_a.ndim != 2 or z_a.shape != z_b.shape or len(z_a) < 2:
        raise ValueError(f"embeddings must both be (N, D), N > 1: {z_a.shape}, {z_b.shape}")
    # Each unit gets mean 0 and variance 1 over the batch; eps keeps a constant one at 0.
    a = F.batch_norm(z_a.float(), None, None, training=True, eps=1e-5)
    b = F.batch_norm(z_b.float(), None, None, training=True, eps=1e-5)
    with torch.autocast(z_a.device.type, enabled=False):  # else it may multiply in bf16
        return a.T @ b / len(a)


def loss_terms(z_a, z_b, auto=False):
    """The two sums of equation 1, sum_i (1 - C_ii)^2 and sum_{i != j} C_ij^2, float32 scalars.

    z_a, z_b: (N, D), embeddings of two views of the same images.
    auto: take the second sum over the autocorrelation of z_a (paper, appendix A), not over C."""
    c = cross_correlation(z_a, z_b)
    invariance = (1 - c.diagonal()).square().sum()
    if auto:
        c = cross_correlation(z_a, z_a)
    redundancy = c.square().sum() - c.diagonal().square().sum()
    return invariance, redundancy


def barlow_twins_loss(z_a, z_b, lambd=0.0051, auto=False):
    """Equation 1, a float32 scalar. (`train` adds the sums itself, since it reports both.)"""
    invariance, redundancy = loss_terms(z_a, z_b, auto)
    return invariance + lambd * redundancy


def gather_batch(z):
    """The embeddings of the whole batch: (n, D) in each of W processes -> (W * n, D) in all.

    Every process computes the loss of the whole batch, but backpropagates to its own n rows only.
    The gradient is the sum of these parts; DistributedDataParallel takes their mean: hence a factor
    W. n must be the same in all processes."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return z
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.detach().contiguous())
    parts[dist.get_rank()] = z  # the only part with a gradient
    batch = torch.cat(parts)
    if batch.requires_grad:
        batch.register_hook(lambda gradient: gradient * len(parts))
    return batch


# --------------------------------------------------------------------------------------- Views
# torchvision's operations (if you know them, go on at `augment`), but for a batch on the device
# that trains. x is float (N, 3, H, H) from 0 to 1; each image has its own parameters, (N, 1, 1, 1).


def uniform(x, low, high):
    """A random number for each image of x: (N, 1, 1, 1)."""
    return x.new_empty(len(x), 1, 1, 1).uniform_(low, high)


def sometimes(x, changed, p):
    """Each image is taken from `changed` with probability p, else from x."""
    return torch.lerp(x, changed, (uniform(x, 0, 1) < p).float())  # faster than torch.where


def random_resized_crop(x, size, scale):
    """v2.RandomResizedCrop(size, (scale, 1)), bilinear without antialiasing: (N, 3, H, H) ->
    (N, 3, size, size). Crops too wide or too high are cut (torchvision draws them again)."""
    area = uniform(x, scale, 1)  # the image is a square of area 1
    ratio = uniform(x, math.log(3 / 4), math.log(4 / 3)).exp()
    width = (area * ratio).sqrt().clamp(max=1)
    height = (area / ratio).sqrt().clamp(max=1)
    left = (1 - width) * uniform(x, 0, 1)
    top = (1 - height) * uniform(x, 0, 1)
    centres = (torch.arange(size, device=x.device) + 0.5) / size  # of pixels in a view
    columns = left + width * centres  # their places in the image, (N, 1, 1, size)
    rows = top + height * centres.view(size, 1)  # (N, 1, size, 1)
    places = torch.stack(torch.broadcast_tensors(columns, rows), dim=4)
    places = 2 * places.squeeze(1) - 1  # (N, size, size, 2), from -1 to 1 for grid_sample
    return F.grid_sample(x, places, padding_mode="border", align_corners=False)


def adjust_hue(x, turn):
    """Turns the hue by a fraction of the colour circle (Wikipedia, "HSL and HSV")."""
    red, green, blue = x.split(1, dim=1)
    value = x.amax(dim=1, keepdim=True)
    chroma = value - x.amin(dim=1, keepdim=True)
    divisor = chroma.clamp(min=1e-12)  # for gray any hue will do
    # In sixths of the circle red is at 0, green at 2, blue at 4; a hue is within 1 of the largest.
    hue = torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor)
    hue = torch.where(value == red, (green - blue) / divisor, hue)
    places = torch.arange(0, 6, 2, device=x.device).view(3, 1, 1)
    distance = (hue + 6 * turn - places + 3) % 6 - 3  # the shorter way round, from -3 to 3
    # A channel is `value` up to 1 from its place, `value - chroma` from 2 on, linear in between.
    return value - chroma * (distance.abs() - 1).clamp(0, 1)


def color_jitter(x):
    """v2.ColorJitter(0.4, 0.4, 0.2, 0.1), with one random order of the operations for the batch."""
    for operation in torch.randperm(4).tolist():
        if operation == 0:  # brightness
            x = uniform(x, 0.6, 1.4) * x
        elif operation == 1:  # contrast
            mean = TF.rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True)
            x = torch.lerp(mean, x, uniform(x, 0.6, 1.4))
        elif operation == 2:  # saturation
            x = torch.lerp(TF.rgb_to_grayscale(x, 3), x, uniform(x, 0.8, 1.2))
        else:
            x = adjust_hue(x, uniform(x, -0.1, 0.1))
        x = x.clamp(0, 1)
    return x


def gaussian_blur(x, sigma):
    """v2.GaussianBlur, but without mirrored borders; sigma is in pixels."""
    pixels = torch.arange(x.shape[-1], device=x.device)
    distance = pixels - pixels.view(-1, 1)
    kernel = torch.exp(-0.5 * (distance / sigma).square())  # for each image: (N, 1, H, H)
    kernel = kernel / kernel.sum(dim=-1, keepdim=True)
    return kernel @ x @ kernel.mT


def normalize(x):
    """Standardizes the channels by ImageNet's means and deviations, as for torchvision's models."""
    red, green, blue = x.unbind(dim=1)  # not by a tensor of means: to copy it makes a GPU wait
    channels = [(red - 0.485) / 0.229, (green - 0.456) / 0.224, (blue - 0.406) / 0.225]
    return torch.stack(channels, dim=1)


def augment(images, size, crop_scale=0.08, blur=0.0, solarize=0.0):
    """T (paper, section 2.2): uint8 (N, 3, H, H) -> normalized float (N, 3, size, size).

    crop_scale: least area of a crop (1 cuts, too: ratios vary). blur, solarize: probabilities."""
    x = random_resized_crop(images / 255, size, crop_scale)
    x = sometimes(x, x.flip(3), 0.5)  # v2.RandomHorizontalFlip()
    x = sometimes(x, color_jitter(x), 0.8)  # v2.RandomApply([v2.ColorJitter(.4, .4, .2, .1)], 0.8)
    x = sometimes(x, TF.rgb_to_grayscale(x, 3), 0.2)  # v2.RandomGrayscale(0.2)
    if size > 32:  # in smaller views sigma is below 0.3, which changes next to nothing
        sigma = uniform(x, 0.1, 2.0) * size / 224  # in proportion to the paper's size
        x = sometimes(x, gaussian_blur(x, sigma), blur)  # v2.RandomApply([v2.GaussianBlur], blur)
    x = sometimes(x, torch.minimum(x, 1 - x), solarize)  # v2.RandomSolarize(0.5, solarize)
    return normalize(x)


# ------------------------------------------------------------------------------------- Network
def small_backbone():
    """Three 3x3 convolutions with BatchNorm and ReLU: (N, 3, H, H) -> (N, 4 * 256)."""
    return nn.Sequential(
        Conv2dNormActivation(3, 64, stride=2),
        Conv2dNormActivation(64, 128, stride=2),
        Conv2dNormActivation(128, 256),
        nn.AdaptiveAvgPool2d(2),  # 2 x 2 means, which tell where things are
        nn.Flatten(),
    )


class BarlowTwins(nn.Module):
    """Backbone and projector (paper, section 2.2): views (N, 3, size, size) -> z_a, z_b, (N, D).

    arch: "small" or the name of a torchvision ResNet.
    projector: the widths of its layers, such as "8192-8192-8192"; the last one is D.
    small_images: 3x3 stem without max-pool (SimCLR, arXiv 2002.05709, appendix B.9)."""

    def __init__(self, arch, projector, small_images):
        super().__init__()
        if arch == "small":
            self.backbone = small_backbone()
            width = 4 * 256
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
        # One after the other, so that BatchNorm takes each view by itself (as the authors do), but
        # in one call, as DistributedDataParallel asks.
        return self.projector(self.backbone(view_a)), self.projector(self.backbone(view_b))


def build(args):
    """The network of these settings, with weights drawn by the seed."""
    torch.manual_seed(args.seed)
    model = BarlowTwins(args.arch, args.projector, small_images=args.image_size <= SMALL_SIDE)
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
                    g = g + group["weight_decay"] * w
                    factor = group["eta"] * w.norm() / g.norm()
                    g = g * torch.where(factor.isfinite() & (factor > 0), factor, 1.0)
                if w not in self.state:
                    self.state[w]["m"] = torch.zeros_like(w)
                m = self.state[w]["m"].mul_(group["momentum"]).add_(g)
                w.sub_(m, alpha=group["lr"])


def make_optimizer(args, model):
    """Two groups, weights and vectors, whose rates `train` sets. LARS decays the weights only, as
    in the authors' code, SGD both, as in lightly's."""
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


# ---------------------------------------------------------------------------------------- Data
def shapes(n, seed, size=32):
    """n drawings of gray flowers in noise, of 1 to 5 petals, filled or in outline, which makes ten
    classes: images, uint8 (n, 3, size, size), and their labels, int64 (n,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (n,), generator=generator)
    petals = (1 + labels % 5).view(n, 1, 1)
    outlined = (labels >= 5).view(n, 1, 1)
    centre_x, centre_y, extent, gray, coin = torch.rand(5, n, 1, 1, generator=generator)
    axis = torch.linspace(-0.5, 1.5, size)  # of the image; centres lie from 0 to 1
    x = axis - centre_x  # (n, 1, size)
    y = axis.view(size, 1) - centre_y  # (n, size, 1)
    # The outline's distance from the centre, in the direction of each pixel:
    edge = (0.4 + 0.3 * extent) * (0.7 + 0.3 * torch.cos(petals * torch.atan2(y, x)))
    distance = torch.hypot(x, y) - edge  # in units of half an image, negative inside
    distance = torch.where(outlined, distance.abs() - 0.08, distance)
    inside = torch.sigmoid(-size * distance)  # with a soft edge of about a pixel
    contrast = 0.4 * (coin - 0.5).sign()  # light on dark or dark on light
    drawing = 0.3 + 0.4 * gray + contrast * (inside - 0.5)
    noise = 0.08 * torch.randn(n, 3, size, size, generator=generator)
    return (255 * (drawing.unsqueeze(1) + noise)).clamp(0, 255).byte(), labels


def read_image(path):
    """The PIL image in a file. Raises OSError, which names the file."""
    try:
        return datasets.folder.default_loader(path)
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise OSError(f"cannot read the image {path}: {error}") from None


def load_data(args):
    """Training and validation set of square images, uint8 (3, image_size, image_size), and labels.
    Shapes and small images are kept in memory, others are read whenever they are needed."""
    side = args.image_size
    if args.data == "shapes":
        train_set = TensorDataset(*shapes(16_000, seed=1, size=side))
        return train_set, TensorDataset(*shapes(4_000, seed=2, size=side))
    square = v2.Compose([v2.Resize(side), v2.CenterCrop(side), v2.PILToTensor()])
    if args.data == "cifar10":
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each machine
            datasets.CIFAR10("data", download=True)
        if dist.is_initialized():
            dist.barrier()
        sets = [datasets.CIFAR10("data", train, square) for train in (True, False)]
    else:
        folders = [f"{args.data}/train", f"{args.data}/val"]
        sets = [datasets.ImageFolder(folder, square, loader=read_image) for folder in folders]
        if sets[0].classes != sets[1].classes:
            sys.exit(f"{args.data}: train and val must hold the same classes")
    if side <= SMALL_SIDE:  # a set's images are stacked as one batch
        sets = [TensorDataset(*default_collate(list(dataset))) for dataset in sets]
    return sets


def subset(dataset, count):
    """A part of a data set, drawn at random, but always the same."""
    drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return Subset(dataset, drawn[:count].tolist())


def batches(dataset, args):
    """Batches of whole normalized images, float (n, 3, H, H), and labels, (n,), on the device."""
    for images, labels in DataLoader(dataset, 250, num_workers=args.workers):
        yield normalize(images.to(DEVICE) / 255), labels.to(DEVICE)


# ---------------------------------------------------------------------------------- Evaluation
def log(args, what, **numbers):
    """Prints numbers by their names and appends them to log.jsonl."""
    print(f"{what:10} ", "  ".join(f"{name} {x:.5g}" for name, x in numbers.items()), flush=True)
    with open(Path(args.out, "log.jsonl"), "a") as file:
        file.write(json.dumps({"what": what, **numbers}) + "\n")


@torch.no_grad()
def extract_features(backbone, data):
    """Representations, float32 (N, R), and labels, (N,), from batches of normalized images,
    (n, 3, H, H), and labels, (n,)."""
    backbone.eval()
    features, labels = zip(*[(backbone(x), y) for x, y in data], strict=True)
    return torch.cat(features).float(), torch.cat(labels)


def knn_accuracy(train_x, train_y, test_x, test_y, k=None, temperature=0.1):
    """Accuracy of a vote of the k nearest training images, weighted by exp(cosine / temperature)
    (Wu et al. 2018, arXiv 1805.01978). train_x (N, R), train_y (N,); test_x (M, R), test_y (M,).
    k: by default a fiftieth of the training images, at most the usual 200."""
    k = k or max(1, min(200, len(train_x) // 50))
    correct = 0
    train_x = F.normalize(train_x)
    # In parts, because M * N cosines may not fit into memory.
    for x, y in zip(F.normalize(test_x).split(1000), test_y.split(1000), strict=True):
        cosine, nearest = (x @ train_x.T).topk(k)
        votes = x.new_zeros(len(x), int(train_y.max()) + 1)
        votes.scatter_add_(1, train_y[nearest], (cosine / temperature).exp())
        correct += int((votes.argmax(dim=1) == y).sum())
    return correct / len(test_y)


def linear_accuracy(train_x, train_y, test_x, test_y):
    """Accuracy of a linear probe: a logistic regression. train_x (N, R), train_y (N,); test_x
    (M, R), test_y (M,). Representations are centred and divided by one number, so that those of
    training have an average variance of 1. The penalty is 0.005 |w|^2 (.github/measured.md)."""
    mean = train_x.mean(dim=0)
    scale = train_x.var(dim=0, correction=0).mean().sqrt().clamp(min=1e-12)
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


def evaluate(args, backbone, train_set, val_set):
    """Accuracies on val_set of a linear probe and of kNN, which know the labels of train_set."""
    train_features = extract_features(backbone, batches(train_set, args))
    val_features = extract_features(backbone, batches(val_set, args))
    linear = linear_accuracy(*train_features, *val_features)
    return {"linear": linear, "knn": knn_accuracy(*train_features, *val_features)}


def compare(args, model, train_set, val_set):
    """Judges raw pixels, the untrained and the trained backbone."""
    pixels = nn.Sequential(nn.AdaptiveAvgPool2d(32), nn.Flatten())
    untrained = build(args).backbone
    # Statistics for its BatchNorm, such as training leaves; update_bn ignores the labels.
    update_bn(batches(subset(train_set, 2000), args), untrained)
    train_set = subset(train_set, args.labels)
    log(args, "raw pixels", **evaluate(args, pixels, train_set, val_set))
    log(args, "untrained", **evaluate(args, untrained, train_set, val_set))
    log(args, "trained", **evaluate(args, model.backbone, train_set, val_set))


@torch.no_grad()
def draw_pictures(args, model, train_set):
    """views.png: pairs of views. correlation.png: C of 256 units before and after training, from -1
    (blue) over 0 (white) to 1 (red), from 512 images, so that a 0 has a standard error of 0.04."""
    images = torch.stack([image for image, _ in subset(train_set, 512)]).to(DEVICE)
    view_a = augment(images, args.size, args.crop_scale, blur=1.0, solarize=0.0)
    view_b = augment(images, args.size, args.crop_scale, blur=0.1, solarize=0.2)
    pairs = torch.stack([view_a, view_b], dim=1)[:32].flatten(0, 1)
    save_image(F.interpolate(pairs, 96), Path(args.out, "views.png"), normalize=True)
    before = cross_correlation(*build(args)(view_a, view_b))  # BatchNorm by this batch
    after = cross_correlation(*model.eval()(view_a, view_b))
    c = torch.stack([before[:256, :256], after[:256, :256]])
    red_green_blue = torch.stack([1 + c.clamp(max=0), 1 - c.abs(), 1 - c.clamp(min=0)], dim=1)
    save_image(red_green_blue, Path(args.out, "correlation.png"), pad_value=1.0)


# ------------------------------------------------------------------------------------ Training
def save_checkpoint(args, model, optimizer, epochs):
    """Writes beside the old checkpoint and renames, so that there is a whole one at any moment."""
    path = Path(args.out, "checkpoint.pt")
    states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"settings": vars(args), "epochs": epochs, **states}, path.with_suffix(".part"))
    os.replace(path.with_suffix(".part"), path)


def load_checkpoint(args, model, optimizer):
    """Restores model and optimizer from the checkpoint in args.out, if there is one. Returns the
    epochs done. Exits if its settings differ or if the processes found different checkpoints."""
    path = Path(args.out, "checkpoint.pt")
    done = 0
    if path.exists():
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged files raise many kinds
            raise OSError(f"cannot load {path}: {error}") from None
        for name, value in vars(args).items():
            may_change = name in ("out", "epochs", "labels", "workers", "precision")
            if not may_change and saved["settings"].get(name) != value:
                sys.exit(f"{path} was made with another {name}: name another --out")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["epochs"]
    if dist.get_world_size() > 1:
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, done)
        if found != [done] * len(found):
            sys.exit(f"--out {args.out} must be one folder, shared by all processes")
    if done and dist.get_rank() == 0:
        print(f"{args.out} goes on after {done} epochs", flush=True)
    return done


def train(args, train_set, val_set):
    """Trains a network on views of train_set and returns it. Goes on from the checkpoint in
    args.out, which process 0 writes after every epoch, when it also evaluates the backbone."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    n = args.batch_size // world_size  # images of a process
    if n * world_size != args.batch_size or args.batch_size > len(train_set):
        limits = f"a multiple of {world_size} processes and at most {len(train_set)} images"
        sys.exit(f"--batch-size must be {limits}, not {args.batch_size}")
    model = build(args)
    if DEVICE.type == "cuda":  # on CPUs BatchNorm sees the images of its own process only
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    net = nn.parallel.DistributedDataParallel(model)
    optimizer = make_optimizer(args, model)
    done = load_checkpoint(args, model, optimizer)
    sampler = DistributedSampler(train_set, seed=1_000_000 * args.seed, drop_last=True)
    options = {"num_workers": args.workers, "pin_memory": DEVICE.type == "cuda"}
    loader = DataLoader(train_set, n, sampler=sampler, drop_last=True, **options)
    steps = len(loader)
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=args.precision == "bf16")

    for epoch in range(done, args.epochs):
        # All randomness follows from here, none need be saved. 1_002_003: seed 1, epoch 2, rank 3.
        torch.manual_seed(1_000_000 * args.seed + 1000 * epoch + rank)
        sampler.set_epoch(epoch)
        started = time.monotonic()
        net.train()
        for step, (images, _) in enumerate(loader, start=1):
            factor = args.batch_size / 256 * learning_rate(epoch + (step - 1) / steps, args.epochs)
            optimizer.param_groups[0]["lr"] = args.lr_weights * factor
            optimizer.param_groups[1]["lr"] = args.lr_biases * factor
            images = images.to(DEVICE, non_blocking=True)
            view_a = augment(images, args.size, args.crop_scale, blur=1.0, solarize=0.0)
            view_b = augment(images, args.size, args.crop_scale, blur=0.1, solarize=0.2)
            with autocast:
                z_a, z_b = net(view_a, view_b)
            z_a, z_b = gather_batch(z_a), gather_batch(z_b)
            invariance, redundancy = loss_terms(z_a, z_b, args.auto)
            loss = invariance + args.lambd * redundancy
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            # Not after every step: to read the loss is to wait for the GPU.
            if rank == 0 and (step % 100 == 0 or step == steps):
                speed = step / (time.monotonic() - started)
                log(
                    args,
                    f"epoch {epoch + step / steps:.2f}",
                    loss=loss.item(),
                    invariance=invariance.item(),
                    redundancy=redundancy.item(),
                    images_per_second=speed * args.batch_size,
                    minutes_left=((args.epochs - epoch) * steps - step) / speed / 60,
                )
        # The weights tell: a loss that is not finite spoils them, and so may the last step.
        if not nn.utils.get_total_norm(model.parameters()).isfinite():
            sys.exit("the loss is not finite: choose lower rates and another --out")
        if rank == 0:  # the others wait in their next forward pass or at the barrier in main
            save_checkpoint(args, model, optimizer, epoch + 1)
            few = max(1, args.labels // 10)
            scores = evaluate(args, model.backbone, subset(train_set, few), subset(val_set, few))
            log(args, f"epoch {epoch + 1}", **scores)
    return model


# -------------------------------------------------------------------------------- Command line
def parse_arguments(argv=None):
    """The flags, completed by the recipe."""
    parser = argparse.ArgumentParser(description="Trains and judges a network by Barlow Twins.")
    add = parser.add_argument
    add("--data", default="shapes", help="shapes, cifar10 or a folder with train/CLASS, val/CLASS")
    add("--recipe", choices=RECIPES, default="small", help="(small)")
    add("--out", help="where to write and to go on, default: runs/DATA-RECIPE")
    add("--seed", type=int, default=0, help="makes runs differ (0)")
    add("--auto", action="store_true", help="see loss_terms")
    add("--precision", choices=["fp32", "bf16"], help="default: bf16 where it is faster (GPU, AMX)")
    for name, (*values, meaning) in SETTINGS.items():
        by_recipe = ", ".join(f"{r} {v}" for r, v in zip(RECIPES, values, strict=True))
        add("--" + name.replace("_", "-"), type=type(values[0]), help=f"{meaning} ({by_recipe})")
    args = parser.parse_args(argv)
    for name, values in SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[RECIPES.index(args.recipe)])
    if args.data not in ("shapes", "cifar10"):
        args.data = str(Path(args.data).resolve())
    args.out = args.out or f"runs/{Path(args.data).name}-{args.recipe}"
    if DEVICE.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        bf16 = hasattr(torch.cpu, "get_capabilities")  # since torch 2.11
        bf16 = bf16 and torch.cpu.get_capabilities().get("amx_bf16", False)
    args.precision = args.precision or ("bf16" if bf16 else "fp32")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    backend = {"cpu": "gloo", "cuda": "nccl"}[DEVICE.type]
    if DEVICE.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        torch.set_float32_matmul_precision("high")  # TF32 for C, which is large
    if "RANK" in os.environ:  # started by torchrun
        # A day, because the other processes wait as long as process 0 evaluates.
        dist.init_process_group(backend, timeout=timedelta(days=1))
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    train_set, val_set = load_data(args)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    model = train(args, train_set, val_set)
    if dist.get_rank() == 0:
        torch.save(model.backbone.state_dict(), Path(args.out, "backbone.pt"))
        compare(args, model, train_set, val_set)
        draw_pictures(args, model, train_set)
        print(f"{args.out} holds backbone.pt, checkpoint.pt, log.jsonl and two pictures")
    # Wait for process 0: five minutes after the first machine is done torchrun ends the others.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
