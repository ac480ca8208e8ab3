"""What the paper promises and what the command line must do, each against an independent oracle."""

import json
import math
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import barlow_twins as bt

CPU, SCRIPT = torch.device("cpu"), Path(bt.__file__).resolve()


def two_embeddings(n, d):
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, n, d, generator=g) @ torch.randn(d, d, generator=g) / d**0.5
    scale, shift = torch.rand(d, generator=g) * 3 + 0.5, torch.randn(d, generator=g)
    return z * scale + shift, (z + 0.5 * noise) * scale - shift


def algorithm_1(z_a, z_b, lambd, redundancy="cross"):
    """The paper's pseudo-code in float64, with BatchNorm's biased variance and eps of 1e-5."""
    z = torch.stack([z_a, z_b]).double()
    z = (z - z.mean(1, keepdim=True)) / torch.sqrt(z.var(1, correction=0, keepdim=True) + 1e-5)
    (z_a, z_b), (_, n, d) = z, z.shape
    c = z_a.T @ z_b / n
    off = c if redundancy == "cross" else z_a.T @ z_a / n
    return (c.diagonal() - 1).pow(2).sum() + lambd * off[~torch.eye(d, dtype=bool)].pow(2).sum()


def close(actual, expected, limit=1e-5):
    return (actual.double() - expected.double()).norm() < limit * expected.double().norm()


# ---------------------------------------------------------------------------------------- Loss
@pytest.mark.parametrize("redundancy", ["cross", "auto"])
@pytest.mark.parametrize("n, d", [(32, 8), (16, 16), (8, 48)])  # N above, at, below D
def test_loss_and_gradient_are_those_of_algorithm_1(n, d, redundancy):
    z = [z.requires_grad_() for z in two_embeddings(n, d)]
    loss, expected = (f(*z, 0.1, redundancy) for f in (bt.barlow_twins_loss, algorithm_1))
    assert loss.dtype == torch.float32 and loss.shape == () and close(loss, expected)
    grads, oracle = torch.autograd.grad(loss, z), torch.autograd.grad(expected, z)
    assert all(close(a, b) for a, b in zip(grads, oracle, strict=True))
    c = torch.corrcoef(torch.cat(z, 1).T)[:d, d:]  # but for the eps of 1e-5
    torch.testing.assert_close(bt.cross_correlation(*z), c, atol=1e-4, rtol=0)
    half = [x.detach().bfloat16() for x in z]
    with torch.autocast("cpu", torch.bfloat16):
        loss, c = bt.barlow_twins_loss(*half, 0.1, redundancy), bt.cross_correlation(*half)
    assert c.dtype == torch.float32 and close(loss, algorithm_1(*half, 0.1, redundancy))


def test_wide_embeddings_never_make_the_d_by_d_matrix():
    z = [z.requires_grad_() for z in two_embeddings(64, 2048)]
    with FlopCounterMode(display=False) as flops:
        bt.barlow_twins_loss(*z).backward()
    assert flops.get_total_flops() <= 6 * 2 * 64 * 64 * 2048  # 16 times less than with C


def test_dead_units_are_harmless_and_bad_embeddings_refused():
    z_a, z = two_embeddings(8, 48)
    z_a[:, 0], z[:, :2] = 7.0, -1.0
    assert bt.cross_correlation(z_a, z)[0].abs().max() < 1e-6
    bt.barlow_twins_loss(z_a.requires_grad_(), z).backward()
    assert z_a.grad.abs().max() < 1000  # which NaN is not
    for pair in [(z, z[:, :3]), (z, z[:7]), (z[0], z[0]), (z[:1], z[:1]), (z[None], z[None])]:
        for function in (bt.cross_correlation, bt.barlow_twins_loss):
            with pytest.raises(ValueError, match="N of 2 or more"):
                function(*pair)


def linear_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 16, bias=False))


def distributed_gradients(rank, world, address, x, queue):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", address, rank=rank, world_size=world)
    model = nn.parallel.DistributedDataParallel(linear_model())
    z_a, z_b = (bt.gather_batch(z) for z in model(x.chunk(world, dim=1)[rank]))
    loss = bt.barlow_twins_loss(z_a, z_b)
    loss.backward()
    assert bt.gather_batch(z_a.detach().bfloat16()).shape == (12 * world, 16)  # as in evaluation
    queue.put((loss.item(), [p.grad.tolist() for p in model.parameters()]))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_many_processes_act_as_one(world, tmp_path):
    x = torch.randn(2, 12, 12) + torch.arange(12).view(12, 1) // 4  # the processes' means differ
    model, queue = linear_model(), mp.get_context("spawn").SimpleQueue()
    loss = bt.barlow_twins_loss(*(bt.gather_batch(z) for z in model(x)))
    loss.backward()
    mp.spawn(distributed_gradients, (world, f"file://{tmp_path}/store", x, queue), nprocs=world)
    for _ in range(world):
        value, grads = queue.get()
        assert value == pytest.approx(loss.item(), rel=1e-5)
        for grad, p in zip(grads, model.parameters(), strict=True):
            assert close(torch.tensor(grad), p.grad)


# --------------------------------------------------------------------------------------- Views
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue", "blur"])
def test_colour_and_blur_are_torchvisions(name):
    x = torch.rand(16, 3, 14, 12, generator=torch.Generator().manual_seed(0))
    x[0], x[1], x[2, :, :6] = x[0, :1], 0.0, 1.0  # gray, black, white
    factor = torch.linspace(*{"hue": (-0.5, 0.5), "blur": (0.1, 2.0)}.get(name, (0.0, 2.0)), 16)
    if name == "blur":
        actual = bt.gaussian_blur(x, factor.view(16, 1))
        pairs = zip(x, factor.tolist(), strict=True)
        expected = [TF.gaussian_blur(image, [23, 23], [f]) for image, f in pairs]
    else:
        ours, theirs = (getattr(module, f"adjust_{name}") for module in (bt, TF))
        actual = ours(x, factor.view(16, 1, 1, 1))
        expected = [theirs(image, f) for image, f in zip(x, factor.tolist(), strict=True)]
    torch.testing.assert_close(actual, torch.stack(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", [32, 20, 64])
def test_resized_crop_is_torchvisions(size):
    x, boxes = torch.rand(20, 3, 40, 32), bt.crop_boxes(20, 40, 32, (0.05, 1.0))
    crops = zip(x, boxes.int().tolist(), strict=True)
    expected = [TF.resized_crop(image, *box, [size, size], antialias=True) for image, box in crops]
    torch.testing.assert_close(bt.resized_crop(x, boxes, size), torch.stack(expected))


def largest_gap(a, b):
    """Between two distribution functions, over that which Kolmogorov-Smirnov allows (p = 0.001)."""
    a, b = (1e4 * a.double()).round(), (1e4 * b.double()).round()  # lest equal values differ
    grid = torch.quantile(torch.cat([a, b]), torch.linspace(0.02, 0.98, 25).double())
    gap = (a[:, None] <= grid).double().mean(0) - (b[:, None] <= grid).double().mean(0)
    return float(gap.abs().max()) / (1.95 * (2 / len(a)) ** 0.5)


def test_crop_boxes_are_distributed_as_torchvisions():
    crop, image = v2.RandomResizedCrop(32, (0.08, 1.0)), torch.empty(3, 32, 48)
    drawn = [crop.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor([[d[k] for k in ("top", "left", "height", "width")] for d in drawn])
    both = []
    for boxes in (bt.crop_boxes(4000, 32, 48, (0.08, 1.0)), theirs):
        top, left, h, w = boxes.double().unbind(1)
        assert (top + h <= 32).all() and (left + w <= 48).all()
        both.append([h * w, w / h, top / (33 - h), left / (49 - w)])
    assert all(largest_gap(a, b) < 1 for a, b in zip(*both, strict=True))


@pytest.mark.parametrize("blur, solarize", [(0.0, 0.0), (0.5, 0.0), (0.0, 0.3)])
def test_views_are_distributed_as_torchvisions(blur, solarize):
    torch.manual_seed(0)
    bar = torch.tensor([4, 4, 4, 4, 4, 4, 1, 1, 1, 1, 1, 1]).expand(3, 12, 12)
    image = (bar * torch.tensor([60, 40, 20]).view(3, 1, 1)).byte()
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
    steps = [v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.2)]
    steps += [v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], blur)]
    pipeline = v2.Compose([*steps, v2.RandomSolarize(0.5, solarize)])
    theirs = torch.stack([pipeline(image / 255) for _ in range(4000)])
    augment = bt.Augment(12, None, blur, solarize)
    ours = torch.cat([augment(image.expand(4, 3, 12, 12)) for _ in range(1000)])
    ours = ours * torch.tensor(bt.STD).view(3, 1, 1) + torch.tensor(bt.MEAN).view(3, 1, 1)
    rates, hues = [], []
    for x in (ours, theirs):
        gray = (x.amax(1) - x.amin(1)).amax((1, 2)) < 1e-4
        plain = (x[:, 0] - 3 * x[:, 2]).abs().amax((1, 2)) < 1e-3  # neither jittered nor gray
        rates.append([gray.double().mean(), plain.double().mean()])
        hues.append(((x[:, 1] - x[:, 2]) / (x[:, 0] - x[:, 2] + 1e-3))[:, 6, 0])
        assert gray.view(1000, 4).all(1).double().mean() < 0.02  # each image draws for itself
    assert torch.tensor(rates).diff(dim=0).abs().max() < 0.03 and largest_gap(*hues) < 1
    assert all(largest_gap(ours[:, c, 6, 5], theirs[:, c, 6, 5]) < 1 for c in (0, 1, 2))


def test_jitter_comes_in_every_order(monkeypatch):
    calls = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(bt, f"adjust_{name}", lambda x, f, name=name: calls.append(name) or x)
    for _ in range(400):
        bt.color_jitter(torch.zeros(1))
    assert len({tuple(calls[i : i + 4]) for i in range(0, 1600, 4)}) == 24


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_never_waits_and_its_views_are_as_on_the_cpu():
    device, images = torch.device("cuda"), bt.shapes(256, seed=3)[0]
    model, _, optimizer, augment_a, augment_b = bt.build(bt.parse_arguments([]), device)
    order = [torch.arange(256, device=device)] * 3
    for step, (crops, _) in enumerate(bt.batches(images.to(device), order, device, 0)):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first warms up
        view_a, view_b = augment_a(crops), augment_b(crops)
        bt.barlow_twins_loss(*model(view_a, view_b)).backward()
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    assert largest_gap(view_a.mean((1, 2, 3)).cpu(), augment_a(images).mean((1, 2, 3))) < 1


# ------------------------------------------------------------------- Network, optimizer, data
def test_network():
    model = bt.BarlowTwins("resnet18", "32-24-16")
    kinds = [(type(layer), getattr(layer, "bias", 0) is None) for layer in model.projector]
    hidden = [(nn.Linear, True), (nn.BatchNorm1d, False), (nn.ReLU, False)]
    assert kinds == [*hidden, *hidden, (nn.Linear, True)]
    assert model.backbone.conv1.stride == (1, 1) and model.backbone.conv1.kernel_size == (3, 3)
    assert not model.backbone.layer1[0].bn2.weight.any()  # zero_init_residual, as the authors have
    for arch, projector in [("vgg11", "8-8"), ("resnet18", "8-"), ("small", "0"), ("small", "a")]:
        with pytest.raises(ValueError, match=r"arch is|projector is"):
            bt.BarlowTwins(arch, projector)
    ours, theirs = bt.make_backbone("resnet18", False)[0], torchvision.models.resnet18()
    for p in ours.parameters():
        nn.init.normal_(p, std=0.05)
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert missing.missing_keys == ["fc.weight", "fc.bias"] and not missing.unexpected_keys
    theirs.fc, x = nn.Identity(), torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))
    filters = bt.small_backbone()[0][0].weight
    assert not filters.requires_grad and torch.equal(filters[:15], -filters[15:])
    patches = F.unfold(bt.normalize(bt.shapes(200, seed=0)[0]), 3).transpose(0, 1).flatten(1)
    assert (filters[:15].flatten(1) @ patches).corrcoef().fill_diagonal_(0).abs().max() < 0.2


def test_lars_is_the_update_written_out():
    weights = [nn.Parameter(w) for w in (torch.randn(4, 3), torch.randn(4), torch.zeros(2, 2))]
    optimizer = bt.LARS(weights, lr=0.3, momentum=0.9, weight_decay=0.1, eta=0.02)
    expected, momenta = [w.detach().clone() for w in weights], [0.0] * 3
    for _ in range(3):
        for i, (w, e) in enumerate(zip(weights, expected, strict=True)):
            w.grad = torch.randn_like(w)
            g = w.grad + 0.1 * e if w.ndim == 2 else w.grad
            factor = 0.02 * e.norm() / g.norm() if w.ndim == 2 and e.any() else 1
            momenta[i] = 0.9 * momenta[i] + factor * g
            e -= 0.3 * momenta[i]
        optimizer.step()
        torch.testing.assert_close([w.detach() for w in weights], expected)


# ---------------------------------------------------------------------------------- Evaluation
def test_knn_is_the_weighted_vote_written_out():
    (x, test_x), (y, test_y) = torch.randn(2, 1300, 6).add(0.5), torch.randint(5, (2, 1300))
    x, y, correct = x[:60], y[:60], 0
    for row, label in zip(test_x, test_y, strict=True):
        similarity = F.cosine_similarity(row[None], x).tolist()
        nearest = sorted(range(60), key=lambda i: -similarity[i])[:20]
        votes = [sum(math.exp(similarity[i] / 0.1) for i in nearest if y[i] == c) for c in range(5)]
        correct += votes.index(max(votes)) == int(label)
    assert bt.knn_accuracy(x, y, test_x, test_y, k=20) == pytest.approx(correct / 1300, abs=1e-6)


def test_linear_probe_is_as_good_as_the_best_linear_rule():
    g = torch.Generator().manual_seed(0)
    centres, (y, test_y) = torch.randn(5, 12, generator=g), torch.randint(5, (2, 2000), generator=g)
    x, test_x = (centres[labels] + torch.randn(2000, 12, generator=g) for labels in (y, test_y))
    bayes = float((torch.cdist(test_x, centres).argmin(1) == test_y).float().mean())
    for a, b in [(x, test_x), (5000 + 300 * x, 5000 + 300 * test_x)]:
        assert abs(bt.linear_accuracy(a, y, b, test_y) - bayes) < 0.015


def test_effective_rank():
    x = torch.randn(4000, 16)
    assert abs(bt.effective_rank(x) - 16) < 0.1 and bt.effective_rank(0 * x) < 1.1


# -------------------------------------------------------------------------------- Command line

TINY = ["--recipe", "quick", "--projector", "16-16", "--batch-size", "24", "--workers", "0"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for part, n in (("train", 120), ("val", 40)):
        for i, (x, y) in enumerate(zip(*bt.shapes(n, seed=n), strict=True)):
            mode, kind = [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png")][i % 4]
            path = root / part / f"класс {y % 2}" / f"{i}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            size = (20 + i % 30, 24 + i % 7) if i % 9 else (1, 1 + 300 * (i % 2))
            TF.to_pil_image(x).resize(size).convert(mode).save(path)
    return root


def run(*arguments):
    bt.main(list(map(str, arguments)))


def refused(capfd, code, *arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    error = capfd.readouterr().err
    if code == 1:  # Python prints what SystemExit holds, and exits with 1
        stop.value.code, error = 1, f"{error}{stop.value.code}\n"
    assert stop.value.code == code and error.count("\n") == 1
    return error.removeprefix("barlow_twins.py: ")


def read_log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_shapes_run(tmp_path, monkeypatch):
    monkeypatch.setattr(bt, "shapes", lambda n, *how, draw=bt.shapes: draw(n // 50, *how))
    run("--epochs", 2, "--batch-size", 100, "--labels", 100, "--out", tmp_path)
    log = read_log(tmp_path)
    assert [line["event"] for line in log] == ["config", *["train", "eval"] * 2, "result"]
    scores = {f"{a}{b}" for a in ("knn", "linear") for b in ("", "_untrained", "_pixels")}
    others = "event data labels epochs seconds images_per_second loss effective_rank"
    assert set(log[-1]) == scores | set(others.split())
    assert log[-1]["labels"] == 100 and all(0 <= log[-1][key] <= 1 for key in scores)
    names = "backbone.pt checkpoint.pt correlation.png log.jsonl neighbours.png views.png"
    assert " ".join(sorted(path.name for path in tmp_path.iterdir())) == names


def test_cifar10_run(tmp_path, monkeypatch):
    """Files laid out like the original ones, whose checksums alone are not asked for."""
    base, (images, labels) = tmp_path / "cifar-10-batches-py", bt.shapes(300, seed=0)
    base.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, x, y in zip(names, images.split(50), labels.split(50), strict=True):
        batch = {"data": x.flatten(1).numpy(), "labels": y.tolist()}
        (base / name).write_bytes(pickle.dumps(batch))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": []}))
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    arguments = ["--data", "cifar10", "--data-dir", str(tmp_path), *TINY]
    loaded, (_, y, val, _) = bt.load_data(bt.parse_arguments(arguments), CPU)
    assert torch.equal(torch.cat([loaded, val]), images) and torch.equal(y, labels[:250])
    run(*arguments, "--epochs", 1, "--out", tmp_path)


def test_training_is_the_loop_written_out(tmp_path, folder):
    """Schedule, order, seeds, loss and gradient: the weights are those of a loop of our own."""
    own = ["--redundancy", "auto", "--lambd", "0.1", "--lr-biases", "0.002", "--precision", "fp32"]
    arguments = ["--data", str(folder), *TINY, *own, "--epochs", "2", "--out", str(tmp_path)]
    run(*arguments)
    args = bt.parse_arguments(arguments)
    images, _ = bt.load_data(args, CPU)
    model, _, optimizer, augment_a, augment_b = bt.build(args, CPU)
    for epoch in range(2):
        order = torch.randperm(120, generator=torch.Generator().manual_seed(epoch))
        torch.manual_seed(hash((0, epoch, 0)))
        for step, i in enumerate(order.view(5, 24)):
            done = (5 * epoch + step - 1) / 9  # after one step of warm-up
            rate = 24 / 256 * (0.5005 + 0.4995 * math.cos(math.pi * done) if done >= 0 else 0)
            optimizer.param_groups[0]["lr"] = args.lr_weights * rate
            optimizer.param_groups[1]["lr"] = 0.002 * rate
            views = augment_a(images[i]), augment_b(images[i])
            z_a, z_b = (model.projector(model.backbone(view)) for view in views)
            optimizer.zero_grad()
            algorithm_1(z_a, z_b, 0.1, "auto").backward()
            optimizer.step()
    for key, value in torch.load(tmp_path / "checkpoint.pt")["model"].items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-3, atol=1e-4)
    model.backbone.load_state_dict(torch.load(tmp_path / "backbone.pt"))
    assert model.backbone.eval()(bt.normalize(images)).mean(0).abs().max() < 0.01  # by update_bn


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, folder):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = ["--data", folder, *TINY, "--epochs", 30, "--out"]
    run(*arguments, whole)
    with subprocess.Popen([sys.executable, SCRIPT, *map(str, arguments), parts]) as victim:
        while not (parts / "checkpoint.pt").exists():
            time.sleep(0.01)
        victim.kill()
    assert torch.load(parts / "checkpoint.pt")["epoch"] < 30
    run(*arguments, parts)
    a, b = (torch.load(out / "backbone.pt") for out in (whole, parts))
    assert all(torch.equal(a[key], b[key]) and a[key].isfinite().all() for key in a)


def test_two_processes_with_files_and_going_on(tmp_path, folder):
    small = ["--arch", "resnet18", "--projector", "16-16", "--size", "32", "--batch-size", "24"]
    small += ["--data", folder, "--workers", "1", "--out", tmp_path, "--epochs"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, SCRIPT, *small, "1"], check=True)
    run(*small, 2)  # with another number of processes
    assert [line["epochs"] for line in read_log(tmp_path) if "epochs" in line] == [1, 1, 2, 2]


BAD_INPUT = """
2 --epochs -1                                  | --epochs
2 --lr-weights nan                             | nan
2 --projector 512-                             | 512-512-512
2 --arch vgg11                                 | resnet50
1 --batch-size 1000000                         | images, 200
1 --data nowhere                               | nowhere/train
1 --data empty                                 | CLASS
1 --data damaged --recipe quick --workers 1    | no_image.png
1 --data cifar10 --data-dir file               | --data shapes
1 --out file/run                               | file/run
1 --evaluate file                              | file
"""


@pytest.mark.parametrize("line", BAD_INPUT.strip().splitlines())
def test_bad_input_is_answered_with_one_sentence(line, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(bt, "shapes", lambda n, *how, draw=bt.shapes: draw(200, *how))
    monkeypatch.chdir(tmp_path)
    names = [f"damaged/{part}/cat/no_image.png" for part in ("train", "val")]
    for name in ("file", "empty/train/cat/a.txt", "empty/val/cat/a.txt", *names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(b"not an image")
    (code, *arguments), says = line.partition("|")[0].split(), line.partition("| ")[2]
    assert says in refused(capfd, int(code), *arguments) and not list(tmp_path.rglob("*.pt"))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_unfit_checkpoints_are_refused_and_kept(tmp_path, folder, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", folder, *TINY, "--out", ".", "--epochs"]
    run(*arguments, 1)
    checkpoint = Path("checkpoint.pt")
    good = checkpoint.read_bytes()
    cases = [(good[: len(good) // 2], "cannot load"), (pickle.dumps(Malicious()), "cannot load")]
    cases += [(good, "projector:", "--projector", "8-8"), (good, "finite", "--lr-weights", "1e30")]
    for content, says, *more in cases:
        checkpoint.write_bytes(content)
        capfd.readouterr()
        assert says in refused(capfd, 1, *arguments, 3, *more)
        assert checkpoint.read_bytes() == content and not Path("executed").exists()


def test_files_of_every_origin_can_be_evaluated(tmp_path, folder, capfd):
    arguments = ["--evaluate", tmp_path / "weights.pt", "--data", folder, *TINY, "--out", tmp_path]
    small, resnet = bt.BarlowTwins("small", "8"), bt.BarlowTwins("resnet18", "8", False)
    theirs = {f"module.{key}": value for key, value in resnet.state_dict().items()}
    theirs = {"model": theirs | {"module.bn.running_mean": torch.zeros(8)}}
    whole = resnet.backbone.state_dict() | {"fc.bias": torch.zeros(1000)}
    for weights in ({"model": small.state_dict()}, small.backbone.state_dict(), theirs, whole):
        torch.save(weights, tmp_path / "weights.pt")
        run(*arguments)
    a, b, c, d = read_log(tmp_path)
    assert list(a) == ["event", "file", "data", "labels", "knn", "linear", "effective_rank"]
    assert a == b and c == d and a != c and a["labels"] == 120
    torch.save({"weight": torch.zeros(3)}, tmp_path / "weights.pt")
    assert "neither the small backbone nor a torchvision" in refused(capfd, 1, *arguments)
