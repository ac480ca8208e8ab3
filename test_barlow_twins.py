"""What the paper promises and what the command line must do, each against an independent oracle.

    pytest

No network and no GPU is needed; images are made on the spot.
"""

import itertools
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import barlow_twins as bt

SCRIPT = str(Path(bt.__file__).resolve())
SIZES = [(32, 8), (16, 16), (8, 48)]  # N larger than, equal to and smaller than D


def two_embeddings(n, d, seed=0):
    """Correlated, with means and scales that differ from unit to unit."""
    g = torch.Generator().manual_seed(seed)
    z_a = torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) / d**0.5
    z_b = z_a + 0.5 * torch.randn(n, d, generator=g)
    scale, shift = torch.rand(d, generator=g) * 3 + 0.5, torch.randn(d, generator=g)
    return z_a * scale + shift, z_b * scale - shift


def algorithm_1(z_a, z_b, lambd, redundancy="cross"):
    """The paper's pseudo-code in float64, with BatchNorm's biased variance and eps of 1e-5."""
    z_a, z_b = (
        (z - z.mean(0)) / torch.sqrt(z.var(0, correction=0) + 1e-5)
        for z in (z_a.double(), z_b.double())
    )
    n, d = z_a.shape
    c = z_a.T @ z_b / n
    off = c if redundancy == "cross" else z_a.T @ z_a / n
    eye = torch.eye(d, dtype=torch.bool)
    return (c.diagonal() - 1).pow(2).sum() + lambd * off[~eye].pow(2).sum()


def relative(actual, expected):
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


# ---------------------------------------------------------------------------------------- Loss


@pytest.mark.parametrize("n, d", SIZES)
def test_cross_correlation_is_a_correlation(n, d):
    z_a, z_b = two_embeddings(n, d)
    c = bt.cross_correlation(z_a, z_b)
    assert c.shape == (d, d) and c.abs().max() <= 1 + 1e-6
    torch.testing.assert_close(c, bt.cross_correlation(z_b, z_a).T)
    exact = dict(atol=1e-4, rtol=0)  # but for the eps of 1e-5 beside variances of 0.1 and more
    own = bt.cross_correlation(z_a, z_a).diagonal()
    torch.testing.assert_close(own, torch.ones(d), **exact)
    oracle = torch.corrcoef(torch.cat([z_a, z_b], 1).T)[:d, d:]
    torch.testing.assert_close(c, oracle, **exact)


@pytest.mark.parametrize("redundancy", ["cross", "auto"])
@pytest.mark.parametrize("n, d", SIZES)
def test_loss_and_gradient_are_those_of_algorithm_1(n, d, redundancy):
    z_a, z_b = (z.requires_grad_() for z in two_embeddings(n, d))
    loss = bt.barlow_twins_loss(z_a, z_b, 0.1, redundancy)
    expected = algorithm_1(z_a, z_b, 0.1, redundancy)
    assert loss.dtype == torch.float32 and loss.shape == ()
    assert relative(loss.detach(), expected.detach()) < 1e-5
    for grad, oracle in zip(
        torch.autograd.grad(loss, (z_a, z_b)),
        torch.autograd.grad(expected, (z_a, z_b)),
        strict=True,
    ):
        assert relative(grad, oracle) < 1e-5


@pytest.mark.parametrize("redundancy", ["cross", "auto"])
@pytest.mark.parametrize("n, d", [(5, 3), (3, 5)])
def test_gradcheck(n, d, redundancy):
    z = [z.double().requires_grad_() for z in two_embeddings(n, d)]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda a, b: bt.barlow_twins_loss(a, b, 0.3, redundancy), z)


def test_equal_views_with_decorrelated_units_give_loss_zero():
    q, _ = torch.linalg.qr(torch.randn(64, 9, generator=torch.Generator().manual_seed(0)).double())
    z = torch.linalg.qr(torch.cat([torch.ones(64, 1), q], 1).double())[0][:, 1:].float() * 100
    assert bt.barlow_twins_loss(z, z, lambd=1.0) < 1e-8


@pytest.mark.parametrize("n, d", SIZES)
def test_invariances(n, d):
    z_a, z_b = two_embeddings(n, d)
    g = torch.Generator().manual_seed(1)
    scale, shift = torch.rand(d, generator=g) * 5 + 0.5, 3 * torch.randn(d, generator=g)
    rows, units = torch.randperm(n, generator=g), torch.randperm(d, generator=g)
    loss = bt.barlow_twins_loss(z_a, z_b)
    for same in [
        (z_a * scale + shift, z_b),  # each view is standardized by itself
        (z_a[rows], z_b[rows]),
        (z_a[:, units], z_b[:, units]),
    ]:
        torch.testing.assert_close(bt.barlow_twins_loss(*same), loss, rtol=3e-4, atol=0)
    assert abs(bt.barlow_twins_loss(z_a[rows], z_b) / loss - 1) > 0.1  # pairs matter
    auto = bt.barlow_twins_loss(z_a, z_a, redundancy="auto")
    torch.testing.assert_close(auto, bt.barlow_twins_loss(z_a, z_a))


class Largest(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_wide_embeddings_never_make_the_d_by_d_matrix():
    n, d = 64, 2048
    z_a, z_b = (z.requires_grad_() for z in two_embeddings(n, d))
    with Largest() as largest, FlopCounterMode(display=False) as gram:
        bt.barlow_twins_loss(z_a, z_b).backward()
    assert largest.elements == n * d
    with FlopCounterMode(display=False) as explicit:
        bt.cross_correlation(z_a, z_b).square().sum().backward()
    assert gram.get_total_flops() * 10 < explicit.get_total_flops()


def test_dead_units_cost_a_bounded_gradient_and_no_nan():
    for n, d in SIZES:
        z_a, z_b = two_embeddings(n, d)
        z_a[:, 0], z_b[:, 0], z_b[:, 1] = 7.0, 7.0, -1.0
        z_a.requires_grad_()
        c = bt.cross_correlation(z_a, z_b)
        assert c[0].abs().max() < 1e-6 and c[:, 1].abs().max() < 1e-6
        bt.barlow_twins_loss(z_a, z_b).backward()
        assert z_a.grad.isfinite().all() and z_a.grad.abs().max() < 1000


def test_half_precision_embeddings_are_judged_in_float32():
    z_a, z_b = two_embeddings(64, 16)
    half_a, half_b = z_a.bfloat16(), z_b.bfloat16()
    expected = algorithm_1(half_a, half_b, 0.0051)
    with torch.autocast("cpu", torch.bfloat16):
        loss, c = bt.barlow_twins_loss(half_a, half_b), bt.cross_correlation(half_a, half_b)
    assert loss.dtype == c.dtype == torch.float32
    assert relative(loss, expected) < 1e-5


def test_bad_shapes_are_refused():
    z = torch.randn(8, 4)
    for a, b in [(z, z[:, :3]), (z, z[:7]), (z[0], z[0]), (z[:1], z[:1]), (z[None], z[None])]:
        for function in (bt.cross_correlation, bt.barlow_twins_loss):
            with pytest.raises(ValueError, match=str(tuple(a.shape)).replace("(", r"\(")[:4]):
                function(a, b)
    with pytest.raises(ValueError, match="cross"):
        bt.barlow_twins_loss(z, z, redundancy="both")


def linear_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 16, bias=False))


def fail_on_one(rank, world, address):
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=world)
    assert bt.agree(rank) == world - 1
    with pytest.raises(bt.Failure, match="of process 1"), bt.together():
        if rank == 1:
            raise bt.Failure("of process 1")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_a_failure_of_one_process_is_raised_on_all(tmp_path):
    mp.spawn(fail_on_one, (2, f"file://{tmp_path}/store"), nprocs=2)


def distributed_gradients(rank, world, address, x_a, x_b, queue):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=world)
    model = nn.parallel.DistributedDataParallel(linear_model())
    z_a, z_b = (bt.gather_batch(model(x.chunk(world)[rank])) for x in (x_a, x_b))
    loss = bt.barlow_twins_loss(z_a, z_b)
    loss.backward()
    features = bt.extract_features(nn.Flatten(), some_images(20), torch.device("cpu"))
    grads = [p.grad.tolist() for p in model.parameters()]
    queue.put((features.sum(1).tolist(), loss.item(), grads))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_many_processes_act_as_one(world, tmp_path):
    x_a, x_b = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(0))
    x_a, x_b = (x + torch.arange(12).view(12, 1) // 4 for x in (x_a, x_b))  # unequal means
    model = linear_model()
    loss = bt.barlow_twins_loss(bt.gather_batch(model(x_a)), model(x_b))
    loss.backward()
    queue = mp.get_context("spawn").SimpleQueue()
    arguments = (world, f"file://{tmp_path}/store", x_a, x_b, queue)
    mp.spawn(distributed_gradients, arguments, nprocs=world)
    for _ in range(world):
        features, value, grads = queue.get()
        assert features == pytest.approx(bt.normalize(some_images(20)).sum((1, 2, 3)).tolist())
        assert value == pytest.approx(loss.item(), rel=1e-5)
        for grad, p in zip(grads, model.parameters(), strict=True):
            assert relative(torch.tensor(grad), p.grad) < 1e-5


# --------------------------------------------------------------------------------------- Views


def some_images(n=16, size=32):
    return bt.shapes(n, seed=3, size=size)[0]


def colourful(n=16):
    """Floats in [0, 1] with every hue, and grays and blacks among them."""
    x = torch.rand(n, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    x[0], x[1], x[2, :, :6] = x[0, :1], 0.0, 1.0
    return x


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_colour_operations_are_torchvisions(name):
    x = colourful()
    factor = torch.linspace(-0.5, 0.5, len(x)) if name == "hue" else torch.linspace(0, 2, len(x))
    oracle = getattr(TF, f"adjust_{name}")
    expected = torch.stack([oracle(image, float(f)) for image, f in zip(x, factor, strict=True)])
    factor = factor.view(-1, 1, 1, 1)
    if name == "hue":
        actual = bt.adjust_hue(x, factor)
    else:
        mix = (torch.full_like(factor, name == kind) for kind in ("contrast", "saturation"))
        actual = bt.blend(x, *mix, factor)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("side", [12, 40])
def test_blur_is_torchvisions(side):
    x = torch.rand(6, 3, side, side, generator=torch.Generator().manual_seed(0))
    sigma = torch.linspace(0.1, 2.0, len(x))
    expected = [TF.gaussian_blur(i, [23, 23], [float(s)]) for i, s in zip(x, sigma, strict=True)]
    torch.testing.assert_close(bt.gaussian_blur(x, sigma), torch.stack(expected))


@pytest.mark.parametrize("size", [32, 20, 64])
def test_resized_crop_is_torchvisions(size):
    images = torch.randint(0, 256, (20, 3, 40, 32), dtype=torch.uint8)
    torch.manual_seed(0)
    boxes, flip = bt.crop_boxes(20, 40, 32, (0.05, 1.0)), torch.arange(20) % 2 == 1
    actual = bt.resized_crop(images, boxes, flip, size)
    for image, box, flipped, crop in zip(images, boxes.int().tolist(), flip, actual, strict=True):
        bicubic = v2.InterpolationMode.BICUBIC
        expected = TF.resized_crop(image / 255, *box, [size, size], bicubic, antialias=True)
        expected = expected.flip(2) if flipped else expected
        torch.testing.assert_close(crop, expected.clamp(0, 1), atol=1e-5, rtol=0)


def test_crop_boxes_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    n, height, width, scale = 4000, 32, 48, (0.08, 1.0)
    ours = bt.crop_boxes(n, height, width, scale)
    crop = v2.RandomResizedCrop(32, scale)
    image = torch.empty(3, height, width)
    drawn = [crop.make_params([image]) for _ in range(n)]
    theirs = torch.tensor([[d[k] for k in ("top", "left", "height", "width")] for d in drawn])

    def quantities(box):
        top, left, h, w = box.double().unbind(1)
        spare = (height - h).clamp(min=1), (width - w).clamp(min=1)
        return h * w, w / h, h, w, top / spare[0], left / spare[1]

    for a, b in zip(quantities(ours), quantities(theirs), strict=True):
        grid = torch.quantile(torch.cat([a, b]), torch.linspace(0.02, 0.98, 25).double())
        distance = (a[:, None] <= grid).double().mean(0) - (b[:, None] <= grid).double().mean(0)
        assert distance.abs().max() < 1.95 * (2 / n) ** 0.5  # Kolmogorov-Smirnov, p = 0.001
    top, left, h, w = ours.unbind(1)
    assert (ours >= 0).all() and (top + h <= height).all() and (left + w <= width).all()


def test_probabilities_of_the_operations():
    torch.manual_seed(0)
    n = 3000
    ramp = torch.linspace(60, 250, 8).view(1, 1, 1, 8)  # brighter to the right
    tint = torch.tensor([1.0, 0.7, 0.4]).view(1, 3, 1, 1)
    images = (ramp * tint).expand(n, 3, 8, 8).byte()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (bt.MEAN, bt.STD))
    for blur, solarize in [(0.0, 0.0), (0.5, 0.0), (0.0, 0.5)]:
        views = bt.Augment(8, blur=blur, solarize=solarize)(images, crop=False) * std + mean
        plain = images / 255
        gray = (views.amax(1) - views.amin(1)).amax((1, 2)) < 1e-4
        untouched = [(views - x).abs().amax((1, 2, 3)) < 1e-3 for x in (plain, plain.flip(3))]
        alone = 0.2 * 0.8 * (1 - 0.95 * blur) * (1 - solarize)  # sigma 0.1 to 0.2 hardly blurs
        rates = [(gray, 0.2), *((u, alone / 2) for u in untouched)]
        if not solarize:
            rates.append((views[..., -1].mean((1, 2)) < views[..., 0].mean((1, 2)), 0.5))
        for happened, p in rates:
            assert abs(happened.double().mean() - p) <= 4 * (p * (1 - p) / n) ** 0.5
    bright = torch.full((n, 3, 8, 8), 255, dtype=torch.uint8)
    inverted = (bt.Augment(8, solarize=0.3)(bright, crop=False) * std + mean).mean((1, 2, 3)) < 0.41
    assert abs(inverted.double().mean() - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5


def test_each_image_meets_the_colour_operations_in_an_order_of_its_own(monkeypatch):
    met, n = [], 2400

    def blend(x, to_mean, to_gray, factor):
        met.append(((to_mean + 2 * to_gray).flatten().int().tolist(), factor.flatten().tolist()))
        return x

    def adjust_hue(x, factor):
        met.append(([3] * n, factor.flatten().tolist()))
        return x

    monkeypatch.setattr(bt, "blend", blend)
    monkeypatch.setattr(bt, "adjust_hue", adjust_hue)
    torch.manual_seed(0)
    bt.colour_jitter(torch.zeros(n, 3, 1, 1))
    orders, factors = Counter(), [[], [], [], []]
    for image in range(n):
        own = [(kinds[image], values[image]) for kinds, values in met if values[image] != 1]
        orders[tuple(kind for kind, _ in own)] += 1
        for kind, factor in own:
            factors[kind].append(factor)
    assert set(orders) == set(itertools.permutations(range(4)))
    assert max(abs(count - n / 24) for count in orders.values()) < 4 * (n / 24) ** 0.5
    for drawn, middle, reach in zip(factors, (1, 1, 1, 0), (0.4, 0.4, 0.2, 0.1), strict=True):
        assert min(drawn) == pytest.approx(middle - reach, abs=0.01)
        assert max(drawn) == pytest.approx(middle + reach, abs=0.01)


def test_jitter_changes_colours_as_torchvisions():
    """The mean colours of many views of one image are those of torchvision's own pipeline."""
    torch.manual_seed(0)
    n = 3000
    image = torch.tensor([200, 120, 60], dtype=torch.uint8).view(3, 1, 1).repeat(1, 8, 8)
    image[:, :, :4] //= 3
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)
    theirs = v2.Compose([v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.2)])
    theirs = torch.stack([bt.normalize(theirs(image / 255)) for _ in range(n)])
    ours = bt.Augment(8)(image.expand(n, 3, 8, 8), crop=False)
    for corner in (0, -1):
        a, b = ours[:, :, 0, corner].double(), theirs[:, :, 0, corner].double()
        error = 4 * ((a.var(0) + b.var(0)) / n).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < error).all()
        torch.testing.assert_close(a.std(0), b.std(0), rtol=0.08, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_views_and_never_waits_in_a_step():
    args = bt.parse_arguments(["--batch-size", "64", "--blur", "0.5", "0.5"])
    augments, images, device = bt.make_augments(args), some_images(64), torch.device("cuda")
    torch.manual_seed(0)
    expected = bt.two_views(images, *augments)
    model = bt.BarlowTwins("small", "32-32").to(device, memory_format=torch.channels_last)
    optimizer = bt.make_optimizer(model, args)
    loader = bt.batches(images.to(device), [torch.arange(64)] * 3, device, 0)
    try:
        for step, batch in enumerate(loader):
            torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first warms up
            torch.manual_seed(0)
            views = bt.two_views(batch, *augments)
            bt.training_step(model, optimizer, views, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for view, same in zip(views, expected, strict=True):
        assert (view.cpu() - same).abs().mean() < 1e-3  # solarization may flip a pixel at 0.5


def test_views_are_deterministic_and_independent():
    augment, images = bt.Augment(24, blur=0.5, solarize=0.2), some_images(1).repeat(32, 1, 1, 1)
    torch.manual_seed(5)
    first = augment(images)
    torch.manual_seed(5)
    assert first.shape == (32, 3, 24, 24) and torch.equal(first, augment(images))
    assert not torch.equal(first, augment(images))
    distance = torch.cdist(first.flatten(1), first.flatten(1)) + 1e9 * torch.eye(32)
    assert distance.min() > 0.1
    crops = torch.stack([images, images.flip(2)], 1)
    a, b = bt.two_views(crops, bt.Augment(32), bt.Augment(32))
    assert a.shape == b.shape == (32, 3, 32, 32)
    assert F.cosine_similarity(a.mean((1, 3)), b.mean((1, 3)).flip(1)).mean() > 0.9

    def called(images, crop):
        return images, crop

    for given, expected, crop in [
        (crops, (images, images.flip(2)), False),
        (images, (images,) * 2, True),
    ]:
        for (seen, asked), view in zip(bt.two_views(given, called, called), expected, strict=True):
            assert torch.equal(seen, view) and asked is crop


# ------------------------------------------------------------------- Network, optimizer, data


def test_the_exported_backbone_is_torchvisions(tmp_path):
    torch.manual_seed(0)
    model = bt.BarlowTwins("resnet18", "32-16", small_images=False).eval()
    for p in model.backbone.parameters():
        nn.init.normal_(p, std=0.05)
    torch.save(model.backbone.state_dict(), tmp_path / "backbone.pt")
    theirs = torchvision.models.resnet18()
    missing = theirs.load_state_dict(torch.load(tmp_path / "backbone.pt"), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    theirs.fc = nn.Identity()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.backbone(x), theirs.eval()(x))


def test_network_layout():
    model = bt.BarlowTwins("resnet18", "32-24-16")
    kinds = [type(layer) for layer in model.projector]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]
    assert all(layer.bias is None for layer in model.projector if isinstance(layer, nn.Linear))
    assert model.backbone.conv1.stride == (1, 1) and model.backbone.conv1.kernel_size == (3, 3)
    assert not model.backbone.layer1[0].bn2.weight.any()  # zero_init_residual, as the authors have
    small = bt.BarlowTwins("small", "7")
    assert (
        small(torch.randn(2, 3, 32, 32)).shape == small(torch.randn(2, 3, 64, 48)).shape == (2, 7)
    )
    x = torch.randn(2, 5, 4, 3)
    torch.testing.assert_close(bt.GlobalAveragePool()(x), F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0])
    for arch, projector in [("vgg11", "8-8"), ("resnet18", "8-"), ("small", "0"), ("small", "a")]:
        with pytest.raises(ValueError, match=projector if arch == "small" else "arch|projector"):
            bt.BarlowTwins(arch, projector)


def test_lars_is_the_update_written_out():
    torch.manual_seed(0)
    w, b, frozen = torch.randn(4, 3), torch.randn(4), torch.zeros(2, 2)
    params = [nn.Parameter(t.clone()) for t in (w, b, frozen)]
    optimizer = bt.LARS(params, lr=0.3, momentum=0.9, weight_decay=0.1, eta=0.02)
    m_w, m_b, m_f = torch.zeros(4, 3), torch.zeros(4), torch.zeros(2, 2)
    for _ in range(3):
        g_w, g_b, g_f = torch.randn(4, 3), torch.randn(4), torch.ones(2, 2)
        for p, g in zip(params, (g_w, g_b, g_f), strict=True):
            p.grad = g.clone()
        optimizer.step()
        d_w = g_w + 0.1 * w
        m_w = 0.9 * m_w + 0.02 * w.norm() / d_w.norm() * d_w
        m_b = 0.9 * m_b + g_b
        d_f = g_f + 0.1 * frozen
        m_f = 0.9 * m_f + d_f * (0.02 * frozen.norm() / d_f.norm() if frozen.any() else 1)
        w, b, frozen = w - 0.3 * m_w, b - 0.3 * m_b, frozen - 0.3 * m_f
        for p, expected in zip(params, (w, b, frozen), strict=True):
            torch.testing.assert_close(p.data, expected)


def test_schedule_at_its_corners():
    rate = [bt.learning_rate(step, 100, 10) for step in range(101)]
    assert rate[0] == 0 and rate[5] == 0.5 and rate[10] == 1
    assert rate[55] == pytest.approx(0.5005) and rate[100] == pytest.approx(0.001)
    assert rate[10:] == sorted(rate[10:], reverse=True)
    assert bt.learning_rate(0, 1, 0) == 1


def test_vectors_get_no_decay_and_their_own_rate():
    model = bt.BarlowTwins("small", "8-8")
    args = bt.parse_arguments(["--weight-decay", "0.5"])
    weights, vectors = bt.make_optimizer(model, args).param_groups
    assert (weights["weight_decay"], vectors["weight_decay"]) == (0.5, 0.0)
    assert {p.ndim for p in vectors["params"]} == {1}
    assert len(weights["params"]) + len(vectors["params"]) == len(list(model.parameters()))


def test_shapes():
    x, y = bt.shapes(3000, seed=1)
    assert x.shape == (3000, 3, 32, 32) and x.dtype == torch.uint8 and y.dtype == torch.int64
    again, other = bt.shapes(3000, seed=1), bt.shapes(3000, seed=2)
    assert torch.equal(x, again[0]) and torch.equal(y, again[1]) and not torch.equal(x, other[0])
    assert y.bincount().min() > 200 and len(y.bincount()) == len(bt.SHAPES) == 10
    assert bt.shapes(4, seed=1, size=48)[0].shape == (4, 3, 48, 48)
    pixels = x.flatten(1) / 255
    assert bt.linear_accuracy(pixels[:500], y[:500], pixels[500:], y[500:]) < 0.3


# ---------------------------------------------------------------------------------- Evaluation


def clusters(n, seed=0, spread=1.0):
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(5, (n,), generator=g)
    centres = torch.randn(5, 12, generator=torch.Generator().manual_seed(9))
    return centres[y] + spread * torch.randn(n, 12, generator=g), y


def test_knn_is_the_weighted_vote_written_out():
    (x, y), (test_x, test_y) = clusters(60, spread=2.0), clusters(300, seed=1, spread=2.0)
    correct = 0
    for row, label in zip(test_x, test_y, strict=True):
        similarity = F.cosine_similarity(row[None], x).tolist()
        nearest = sorted(range(60), key=lambda i: -similarity[i])[:20]
        votes = [sum(math.exp(similarity[i] / 0.1) for i in nearest if y[i] == c) for c in range(5)]
        correct += votes.index(max(votes)) == int(label)
    assert bt.knn_accuracy(x, y, test_x, test_y, k=20) == pytest.approx(correct / 300, abs=1e-6)
    assert bt.knn_accuracy(x, y, x, y, k=1) == 1.0
    assert 0 < bt.knn_accuracy(x, y, test_x, test_y) < 1  # k = 200 of 60


def test_linear_probe_is_as_good_as_the_best_linear_rule():
    (x, y), (test_x, test_y) = clusters(2000), clusters(2000, seed=1)
    centres = torch.stack([x[y == c].mean(0) for c in range(5)])
    bayes = float((torch.cdist(test_x, centres).argmin(1) == test_y).float().mean())
    shifted = [t * torch.logspace(2, 3, 12) + 5000 for t in (x, test_x)]
    for a, b in [(x, test_x), shifted]:
        assert abs(bt.linear_accuracy(a, y, b, test_y) - bayes) < 0.015
    # Half of the labels drawn anew and units of noise call for a penalty: without one it gets 0.78.
    g = torch.Generator().manual_seed(0)
    drawn = torch.where(
        torch.rand(2000, generator=g) < 0.5, torch.randint(5, (2000,), generator=g), y
    )
    x, test_x = (torch.cat([t, torch.randn(2000, 50, generator=g)], 1) for t in (x, test_x))
    assert bt.linear_accuracy(x[:1000], drawn[:1000], test_x, test_y) > 0.82


def test_effective_rank():
    x = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))
    assert bt.effective_rank(x) == pytest.approx(16, rel=0.01)
    assert bt.effective_rank(x[:, :3] @ torch.randn(3, 64)) < 3.1
    assert bt.effective_rank(torch.ones(100, 8)) == pytest.approx(1, abs=0.01)


def test_features_are_those_of_the_backbone_in_evaluation_mode():
    model, images = bt.BarlowTwins("small", "8"), some_images(30)
    x = bt.extract_features(model.backbone, images, torch.device("cpu"))
    assert model.backbone.training and x.shape == (30, 256) and not x.requires_grad
    torch.testing.assert_close(x[3:5], model.backbone.eval()(bt.normalize(images[3:5])))


# -------------------------------------------------------------------------------- Command line


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """120 + 40 drawings of two classes, of several sizes and modes, in ImageNet's layout."""
    root = tmp_path_factory.mktemp("images")
    for part, n in (("train", 120), ("val", 40)):
        images, labels = bt.shapes(n, seed=n)
        for i, (x, y) in enumerate(zip(images, labels, strict=True)):
            image = TF.to_pil_image(x).resize((20 + i % 30, 24 + i % 7))
            image = image.convert(["RGB", "L", "CMYK", "P", "RGBA", "I;16"][i % 6 if i < 12 else 0])
            kind = ".png" if image.mode in ("P", "RGBA", "I;16") else ".jpg"
            path = root / part / f"класс {y % 2}" / f"{i}{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return root


TINY = ["--recipe", "quick", "--projector", "16-16", "--batch-size", "24", "--workers", "0"]


def read_log(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def run(*arguments, processes=None, code=0):
    """The program in a process of its own, alone or under torchrun."""
    command = [sys.executable, SCRIPT]
    if processes:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), SCRIPT]
    done = subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    return done


def equal_states(a, b):
    a, b = (torch.load(Path(out) / "checkpoint.pt") for out in (a, b))
    for part in (a["model"], b["model"]):
        assert all(value.isfinite().all() for value in part.values())
    return all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


def test_shapes_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        bt, "shapes", lambda n, seed, size, draw=bt.shapes: draw(n // 50, seed, size)
    )
    bt.main(["--epochs", "2", "--batch-size", "100", "--out", str(tmp_path / "run")])
    log = read_log(tmp_path / "run")
    assert {line["event"] for line in log} == {"config", "train", "eval", "result"}
    result = log[-1]
    scores = {f"{a}{b}" for a in ("knn", "linear") for b in ("", "_untrained", "_pixels")}
    assert all(0 <= result[key] <= 1 for key in scores)
    others = {"event", "data", "epochs", "seconds", "images_per_second", "loss", "effective_rank"}
    assert set(result) == scores | others
    assert (result["event"], result["data"], result["epochs"]) == ("result", "shapes", 2)
    printed = capsys.readouterr().out
    assert (
        "warning" not in printed and "images/s" in printed and f"{result['linear']:.3f}" in printed
    )
    backbone, _ = bt.make_backbone("small", True)
    backbone.load_state_dict(torch.load(tmp_path / "run" / "backbone.pt"))


def test_cifar10_run(tmp_path, monkeypatch):
    """Files laid out like the original ones, whose checksums alone are not asked for."""
    base = tmp_path / "data" / "cifar-10-batches-py"
    base.mkdir(parents=True)
    images, labels = bt.shapes(300, seed=0)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, x, y in zip(names, images.split(50), labels.split(50), strict=True):
        batch = {"data": x.flatten(1).numpy(), "labels": y.tolist()}
        (base / name).write_bytes(pickle.dumps(batch))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": list(bt.SHAPES)}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    arguments = ["--data", "cifar10", "--data-dir", str(tmp_path / "data"), *TINY]
    data = bt.load_data(bt.parse_arguments(arguments))
    assert torch.equal(data.unlabelled, images[:250]) and torch.equal(data.val_y, labels[250:])
    bt.main([*arguments, "--epochs", "1", "--out", str(tmp_path / "run")])
    assert read_log(tmp_path / "run")[-1]["data"] == "cifar10"


def test_folder_run_and_going_on(tmp_path, folder):
    arguments = ["--data", str(folder), *TINY]
    bt.main([*arguments, "--epochs", "4", "--out", str(tmp_path / "whole")])
    original, epochs = bt.save_whole, []

    def save_and_die(state, path):
        original(state, path)
        epochs.append(state["epoch"])
        if len(epochs) == 2:
            raise KeyboardInterrupt

    bt.save_whole = save_and_die
    try:
        with pytest.raises(SystemExit) as stop:
            bt.main([*arguments, "--epochs", "4", "--out", str(tmp_path / "parts")])
    finally:
        bt.save_whole = original
    assert stop.value.code == 130 and epochs == [1, 2]
    bt.main([*arguments, "--epochs", "4", "--out", str(tmp_path / "parts")])
    assert equal_states(tmp_path / "whole", tmp_path / "parts")
    whole, parts = (read_log(tmp_path / name)[-1] for name in ("whole", "parts"))
    for clock in ("seconds", "images_per_second"):
        del whole[clock], parts[clock]
    assert whole == parts


def test_a_training_step_follows_the_gradient_of_the_loss():
    torch.manual_seed(0)
    model, views = bt.BarlowTwins("small", "12-10"), torch.randn(2, 6, 3, 32, 32)
    args = bt.parse_arguments(["--lambd", "0.3", "--redundancy", "auto", "--precision", "fp32"])
    before = [p.detach().clone() for p in model.parameters()]
    loss = bt.barlow_twins_loss(model(views[0]), model(views[1]), 0.3, "auto")
    grads = torch.autograd.grad(loss, list(model.parameters()))
    terms = bt.training_step(model, torch.optim.SGD(model.parameters(), 0.1), views, args)
    assert float(terms @ torch.tensor([1, 0.3])) == pytest.approx(loss.item())
    for p, old, grad in zip(model.parameters(), before, grads, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * grad)


def test_training_follows_the_schedule_and_shuffles_every_epoch(tmp_path, folder, monkeypatch):
    rates, seen, step, views = [], [], bt.training_step, bt.two_views

    def spy_on_step(model, optimizer, *rest):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(model, optimizer, *rest)

    def spy_on_views(images, *augments):
        seen.append(images.flatten(1).long().sum(1))
        return views(images, *augments)

    monkeypatch.setattr(bt, "training_step", spy_on_step)
    monkeypatch.setattr(bt, "two_views", spy_on_views)
    rate = ["--lr-weights", "0.2", "--lr-biases", "0.1", "--epochs", "2"]
    bt.main(["--data", str(folder), *TINY, *rate, "--out", str(tmp_path)])
    expected = [0.2 * 24 / 256 * bt.learning_rate(i, 10, 1) for i in range(10)]
    assert [weights for weights, _ in rates] == pytest.approx(expected)
    assert [biases for _, biases in rates] == pytest.approx([rate / 2 for rate in expected])
    batches = [images for images in seen if len(images) == 24]
    first, second = torch.cat(batches[:5]), torch.cat(batches[5:])
    assert not torch.equal(first, second) and torch.equal(first.sort()[0], second.sort()[0])


def test_imagenet_recipe_with_workers_and_two_processes(tmp_path, folder):
    small = ["--arch", "resnet18", "--projector", "16-16", "--size", "32", "--batch-size", "24"]
    arguments = ["--data", folder, *small, "--workers", 1, "--out", tmp_path / "run", "--epochs"]
    done = run(*arguments, 1, processes=2)
    assert "2 processes" in done.stdout and done.stdout.count("untrained backbone  ") == 1
    run(*arguments, 2)  # goes on, with another number of processes
    assert [line["epochs"] for line in read_log(tmp_path / "run") if "epochs" in line][-1] == 2


def test_crops_from_files_depend_on_seed_epoch_and_index_alone(folder):
    crops = bt.Folder(folder / "train", 32, 0, (0.1, 1.0), seed=1)
    first = [crops[i] for i in (3, 4)]
    assert first[0].shape == (2, 3, 32, 32) and not torch.equal(*first[0])
    assert torch.equal(crops[4], first[1]) and torch.equal(crops[3], first[0])
    args = bt.parse_arguments(["--batch-size", "50", "--workers", "0"])
    rest = list(bt.batches_of_epoch(crops, 1, 1, args, torch.device("cpu")))
    assert crops.epoch == 1 and [batch.shape for batch in rest] == [(50, 2, 3, 32, 32)]
    assert not torch.equal(crops[3], first[0])


@pytest.mark.parametrize("capabilities, precision", [({"avx512_bf16": True}, "bf16"), ({}, "fp32")])
def test_bf16_is_the_default_where_the_cpu_has_it(capabilities, precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert bt.parse_arguments([]).precision == precision
    assert bt.parse_arguments(["--precision", "fp32"]).precision == "fp32"


def test_sixteen_bit_images_keep_their_range(tmp_path):
    gray = torch.arange(0, 65536, 257, dtype=torch.int32).view(16, 16)
    Image.fromarray(gray.numpy().astype("uint16")).save(tmp_path / "16.png")
    pixels = TF.pil_to_tensor(bt.read_image(tmp_path / "16.png"))
    assert (pixels.int() - torch.arange(256).view(1, 16, 16)).abs().max() <= 1


def bad_folder(tmp_path, *names, content=b"not an image"):
    for name in names:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return str(tmp_path / "images")


@pytest.mark.parametrize(
    "arguments, says, code",
    [
        (["--epochs", "-1"], "--epochs", 2),
        (["--epochs", "0"], "--epochs", 2),
        (["--batch-size", "1"], "--batch-size", 2),
        (["--lr-weights", "nan"], "nan", 2),
        (["--lr-biases", "-1"], "--lr-biases", 2),
        (["--lambd", "inf"], "inf", 2),
        (["--seed", "1.5"], "1.5", 2),
        (["--projector", "512-"], "512-512-512", 2),
        (["--arch", "vgg11"], "resnet50", 2),
        (["--blur", "2", "0"], "from 0 to 1", 2),
        (["--nonsense"], "--nonsense", 2),
        (["--batch-size", "1000000"], "number of images (", 1),
        (["--data", "{tmp}/nowhere"], "{tmp}/nowhere/train", 1),
        (["--data", "{empty}"], "holds no images", 1),
        (["--data", "{damaged}", *TINY], "no_image.png", 1),
        (["--data", "{damaged}", *TINY, "--workers", "1"], "no_image.png", 1),
        (["--data", "cifar10", "--data-dir", "{file}"], "--data shapes", 1),
        (["--out", "{file}/run"], "{file}/run", 1),
    ],
)
def test_bad_input_is_answered_with_one_sentence(
    arguments, says, code, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(bt, "shapes", lambda n, seed, size, draw=bt.shapes: draw(200, seed, size))
    monkeypatch.chdir(tmp_path)
    names = {
        "tmp": tmp_path,
        "file": bad_folder(tmp_path / "1", "file") + "/file",
        "empty": bad_folder(tmp_path / "2", "train/cat/a.txt", "val/cat/a.txt"),
        "damaged": bad_folder(tmp_path / "3", *(f"{p}/cat/no_image.png" for p in ("train", "val"))),
    }
    with pytest.raises(SystemExit) as stop:
        bt.main([argument.format(**names) for argument in arguments])
    error = capfd.readouterr().err
    assert stop.value.code == code and says.format(**names) in error
    assert error.startswith("barlow_twins.py: ") and error.count("\n") == 1
    assert "Traceback" not in error and not list(tmp_path.rglob("checkpoint.pt"))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_unfit_checkpoints_are_refused_and_kept(tmp_path, folder, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", str(folder), *TINY, "--out", "run"]
    bt.main([*arguments, "--epochs", "1"])
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    good = checkpoint.read_bytes()

    def refused(content, says, *more):
        checkpoint.write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            bt.main([*arguments, "--epochs", "2", *more])
        error = capfd.readouterr().err
        assert stop.value.code == 1 and says in error and error.count("\n") == 1
        assert str(checkpoint.relative_to(tmp_path)) in error and "--out" in error
        assert checkpoint.read_bytes() == content

    refused(good[: len(good) // 2], "damaged")
    refused(pickle.dumps(Malicious()), "damaged")
    assert not (tmp_path / "executed").exists()
    torch.save({"model": {}}, tmp_path / "foreign.pt")
    refused((tmp_path / "foreign.pt").read_bytes(), "no checkpoint of this program")
    for flag, value in [("--projector", "8-8"), ("--batch-size", "12"), ("--arch", "resnet18")]:
        refused(good, value, flag, value)
    checkpoint.write_bytes(good)
    bt.main([*arguments, "--epochs", "2"])  # more epochs are welcome


def test_a_full_disk_leaves_the_old_checkpoint_whole(tmp_path, folder, monkeypatch, capfd):
    arguments = ["--data", str(folder), *TINY, "--out", str(tmp_path), "--epochs"]
    bt.main([*arguments, "1"])
    good = (tmp_path / "checkpoint.pt").read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        bt.main([*arguments, "2"])
    error = capfd.readouterr().err
    assert stop.value.code == 1 and "No space left" in error and "checkpoint.pt" in error
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, folder, capfd):
    arguments = ["--data", str(folder), *TINY, "--out", str(tmp_path), "--epochs"]
    bt.main([*arguments, "1"])
    good = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        bt.main([*arguments, "3", "--lr-weights", "1e30"])
    error = capfd.readouterr().err
    assert stop.value.code == 1 and "epoch 2, step" in error and "--lr-weights (1e+30)" in error
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


@pytest.mark.parametrize(
    "number, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 0), (signal.SIGINT, 130)]
)
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(number, code, tmp_path, folder):
    arguments = ["--data", str(folder), *TINY, "--epochs", "40"]
    bt.main([*arguments, "--out", str(tmp_path / "whole")])
    arguments = list(map(str, [*arguments, "--out", tmp_path / "parts"]))
    victim = subprocess.Popen([sys.executable, SCRIPT, *arguments])
    checkpoint = tmp_path / "parts" / "checkpoint.pt"
    while not checkpoint.exists():
        time.sleep(0.01)
    time.sleep(0.1)
    victim.send_signal(number)
    assert victim.wait(timeout=20) == code
    assert torch.load(checkpoint)["epoch"] < 40
    bt.main(arguments)
    assert equal_states(tmp_path / "whole", tmp_path / "parts")


def test_files_of_every_origin_can_be_evaluated(tmp_path, folder, capfd):
    def evaluated(weights, *more):
        torch.save(weights, tmp_path / "weights.pt")
        arguments = ["--evaluate", tmp_path / "weights.pt", "--data", folder, *TINY, *more]
        bt.main([str(a) for a in [*arguments, "--out", tmp_path / "out"]])
        return read_log(tmp_path / "out")[-1], capfd.readouterr().out

    torch.manual_seed(0)
    small, resnet = bt.BarlowTwins("small", "8"), bt.BarlowTwins("resnet18", "8", False)
    result, _ = evaluated({"model": small.state_dict()})
    shares = {"linear", "linear_10_percent", "linear_1_percent", "knn_20", "knn_200"}
    assert set(result) == {"event", "file", "data"} | shares and result["event"] == "evaluation"
    assert all(0 <= result[key] <= 1 for key in shares)
    again, _ = evaluated(small.backbone.state_dict())
    assert again == result
    theirs = {f"module.{key}": value for key, value in resnet.state_dict().items()}
    theirs |= {"module.bn.running_mean": torch.zeros(8)}
    whole, said = evaluated({"epoch": 1, "model": theirs, "optimizer": {}})
    assert "resnet18, stem for large images" in said
    fc = {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    assert evaluated(resnet.backbone.state_dict() | fc)[0] == whole
    assert "small images" in evaluated(bt.make_backbone("resnet34", True)[0].state_dict())[1]
    with pytest.raises(SystemExit):
        evaluated({"weight": torch.zeros(3)})
    assert "neither the small backbone nor a torchvision ResNet" in capfd.readouterr().err


def test_benchmark_prints_a_table_and_a_json_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    clock = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) / 100)
    more, step = [], bt.training_step

    def spy(model, optimizer, views, args, *rest, **marks):
        more.append(rest)
        return step(model, optimizer, views, args, *rest, **marks)

    monkeypatch.setattr(bt, "training_step", spy)
    bt.main(["--benchmark", "--data", "cifar10", "--data-dir", "/dev/null", *TINY])
    *table, last = capfd.readouterr().out.partition("milliseconds")[2].splitlines()
    rows = {row[:16].strip(): float(row[16:24]) for row in table[1:]}
    result = json.loads(last)
    parts = ("load", "views", "forward", "loss", "backward", "optimizer")
    assert rows["whole step"] == pytest.approx(sum(rows[part] for part in parts)) == 60
    assert result["event"] == "benchmark" and result["recipe"] == "quick"
    assert result["step_ms"] == pytest.approx(rows["whole step"], abs=0.1)
    assert result["images_per_second"] == pytest.approx(24_000 / result["step_ms"])
    assert result["step_over_limit"] == pytest.approx(6)
    assert result["loss_share"] == pytest.approx(1 / 6)
    z = torch.randn(2, 6, 4, requires_grad=True)
    (terms,) = more[1]
    sum(terms(*z, "cross")).backward()
    assert z.grad.std(1).min() > 0  # BatchNorm would cancel a gradient that is equal for all images


def test_a_collapsed_representation_is_noticed():
    def warning(x):
        return bt.collapse(x, bt.effective_rank(x))

    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0)).relu()
    assert warning(x) == ""
    line = torch.linspace(0, 1, 500)[:, None] * torch.rand(64)
    assert "fills 2.0 of 64" in warning(line) or "fills 1." in warning(line)
    assert "75% of its units are dead" in warning(x * (torch.arange(64) < 16))


def test_pictures_show_what_they_say(tmp_path):
    before, now = torch.zeros(6, 6), torch.eye(6) - 0.5 * torch.eye(6).flip(0)
    bt.draw_correlation(tmp_path / "c.png", before, now)
    pixels = TF.pil_to_tensor(Image.open(tmp_path / "c.png"))
    corner = pixels[:, 2, 10]  # of the right half, behind the frame
    assert pixels[:, 2, 2].tolist() == [255] * 3 and corner.tolist() == [255, 0, 0]
    assert pixels[:, 2, 15].tolist() == [128, 128, 255]
    c = torch.full((1024, 1024), 0.1).fill_diagonal_(1.0)
    small = bt.shrink(c)
    assert small.shape == (256, 256) and small.diagonal().min() > 0.99
    assert small[0, 1] == pytest.approx(0.1)


@pytest.mark.parametrize("width, height", [(1, 1), (1, 900), (300, 2)])
def test_images_of_any_size_are_read(width, height, tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "empty").mkdir()
    Image.new("L", (width, height), 77).save(tmp_path / "cat" / "a.png")
    for scale, shape in [(None, (3, 32, 32)), ((0.1, 1.0), (2, 3, 32, 32))]:
        item = bt.Folder(tmp_path, 32, 1 / 16, scale)[0]
        assert item.shape == shape and (item == 77).all()
