"""What the paper promises and what the command line must do, each against an independent oracle."""

import json
import math
import pickle
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.data import DataLoader, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

import barlow_twins as bt


@pytest.fixture(autouse=True)
def on_a_cpu_and_from_one_seed(monkeypatch):
    monkeypatch.setattr(bt, "DEVICE", torch.device("cpu"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that a test starts
    monkeypatch.setattr(bt, "shapes", lambda n, seed, draw=bt.shapes: draw(min(n, 160), seed))
    torch.manual_seed(0)


# ---------------------------------------------------------------------------------------- Loss
def correlation(z_a, z_b):
    """C of Algorithm 1 in float64, with BatchNorm's biased variance and eps of 1e-5."""
    z = torch.stack([z_a, z_b]).double()
    variance = z.var(dim=1, correction=0, keepdim=True)
    a, b = (z - z.mean(dim=1, keepdim=True)) / (variance + 1e-5).sqrt()
    return a.T @ b / len(a)


def algorithm_1(z_a, z_b, lambd, redundancy="cross"):
    on_diagonal = (1 - correlation(z_a, z_b).diagonal()).square().sum()
    c = correlation(z_a, z_b if redundancy == "cross" else z_a)
    return on_diagonal + lambd * (c - c.diagonal().diag()).square().sum()


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def run_code_of_readme(block):
    readme = Path(bt.__file__).with_name("README.md").read_text()
    names = {"__name__": "__main__"}
    exec(readme.split("```python\n")[block].split("```")[0], names)
    return names


@pytest.mark.parametrize("redundancy", ["cross", "auto"])
@pytest.mark.parametrize("n, d", [(8, 48), (16, 16), (32, 8)])
def test_loss_and_gradient_are_those_of_algorithm_1(n, d, redundancy):
    z_a = torch.randn(n, d) @ torch.randn(d, d)
    z_b = z_a + torch.randn(n, d)
    z_a[:, 0] = 7  # a dead unit
    z = [z_a.requires_grad_(), z_b.requires_grad_()]
    assert relative_error(bt.cross_correlation(*z), correlation(*z)) < 1e-5
    with FlopCounterMode(display=False) as flops:
        loss = bt.barlow_twins_loss(*z, 0.1, redundancy)
    assert flops.get_total_flops() <= 4 * n * d * min(n, d)  # with D above N no D x D matrix
    expected = algorithm_1(*z, 0.1, redundancy)
    assert relative_error(loss, expected) < 1e-5
    gradients = torch.autograd.grad(loss, z)
    assert max(map(relative_error, gradients, torch.autograd.grad(expected, z))) < 2e-5
    copied = run_code_of_readme(1)["barlow_twins_loss"](*z, 0.1)
    assert relative_error(copied, algorithm_1(*z, 0.1)) < 1e-5
    half = [z_a.bfloat16(), z_b.bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = bt.barlow_twins_loss(*half, redundancy=redundancy)
    assert relative_error(loss, algorithm_1(*half, 0.0051, redundancy)) < 1e-5


def test_c_and_the_loss_have_the_properties_of_correlations():
    z_a, z_b = torch.randn(2, 16, 24)
    c = bt.cross_correlation(z_a, z_b)
    assert c.abs().max() <= 1
    torch.testing.assert_close(c.T, bt.cross_correlation(z_b, z_a))
    unit = bt.cross_correlation(z_a, z_a).diagonal()
    torch.testing.assert_close(unit, torch.ones(24), atol=1e-4, rtol=0)
    loss = bt.barlow_twins_loss(z_a, z_b)
    images, units = torch.randperm(16), torch.randperm(24)
    torch.testing.assert_close(bt.barlow_twins_loss(z_a[images], z_b[images]), loss)
    torch.testing.assert_close(bt.barlow_twins_loss(z_a[:, units], z_b[:, units]), loss)
    changed = bt.barlow_twins_loss(2 * z_a + 4, z_b / 2 - 1)
    assert relative_error(changed, loss) < 1e-4  # because of eps
    decorrelated = torch.linalg.qr(z_a[:, :8] - z_a[:, :8].mean(dim=0)).Q
    assert bt.barlow_twins_loss(decorrelated, decorrelated) < 1e-4
    assert bt.barlow_twins_loss(torch.ones(16, 24), torch.ones(16, 24), 0.1) == 24
    repeated = z_a[:, :1].expand(16, 24)
    assert bt.barlow_twins_loss(repeated, repeated, 0.1) == pytest.approx(0.1 * 24 * 23, rel=1e-4)


@pytest.mark.parametrize("lambd", [0.0051, 0.1])
def test_descent_on_the_embeddings_ends_at_the_floor(lambd):
    z = torch.randn(2, 32, 64, requires_grad=True)
    for _ in range(1000):
        loss = bt.barlow_twins_loss(*z, lambd)
        z.data -= 10 * torch.autograd.grad(loss, z)[0]
    assert 1 - 1e-5 <= loss / bt.loss_floor(32, 64, lambd) <= 1 + 1e-3
    assert bt.loss_floor(65, 64, lambd) == bt.loss_floor(99, 64, lambd) == 0
    assert bt.loss_floor(32, 64, 9.0) == bt.loss_floor(32, 64, 1.0)


@pytest.mark.parametrize("function", [bt.cross_correlation, bt.barlow_twins_loss])
def test_embeddings_that_do_not_fit_are_refused(function):
    z = torch.randn(8, 4)
    for pair in [(z, z[:, 1:]), (z, z[1:]), (z[0], z[0]), (z[:1], z[:1]), (z[None], z[None])]:
        with pytest.raises(ValueError, match="N of 2 or more"):
            function(*pair)
    with pytest.raises(ValueError, match="redundancy"):
        bt.barlow_twins_loss(z, z, redundancy="both")


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 16, bias=False))


def loss_of_one_process(rank, world_size, folder, x):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    model = nn.parallel.DistributedDataParallel(small_model())
    z_a, z_b = model(x.chunk(world_size, dim=1)[rank])
    loss = bt.barlow_twins_loss(bt.gather_batch(z_a), bt.gather_batch(z_b))
    loss.backward()
    torch.save([loss.detach(), *(w.grad for w in model.parameters())], f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_processes_act_as_one(world_size, tmp_path):
    x = torch.randn(2, 12, 12) + torch.arange(12).view(12, 1) // 4  # the processes' means differ
    model = small_model()
    loss = bt.barlow_twins_loss(*model(x))
    loss.backward()
    expected = [loss.detach(), *(w.grad for w in model.parameters())]
    mp.spawn(loss_of_one_process, (world_size, tmp_path, x), nprocs=world_size)
    for rank in range(world_size):
        errors = map(relative_error, torch.load(tmp_path / str(rank)), expected)
        assert max(errors) < 1e-5


# --------------------------------------------------------------------------------------- Views
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0]])
def test_colour_jitter_is_torchvisions(order, monkeypatch):
    operations = [
        (TF.adjust_brightness, 0.6, 1.4),
        (TF.adjust_contrast, 0.6, 1.4),
        (TF.adjust_saturation, 0.8, 1.2),
        (TF.adjust_hue, -0.1, 0.1),
    ]
    monkeypatch.setattr(torch, "randperm", lambda n: torch.tensor(order))
    monkeypatch.setattr(bt, "uniform", lambda x, a, b: torch.linspace(a, b, 16).view(16, 1, 1, 1))
    x = torch.rand(16, 3, 20, 20)
    x[:3] = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)  # black, gray, white
    actual = bt.color_jitter(x)
    for adjust, low, high in [operations[i] for i in order]:
        strengths = torch.linspace(low, high, 16).tolist()
        x = torch.stack([adjust(*pair) for pair in zip(x, strengths, strict=True)])
    torch.testing.assert_close(actual, x, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "ours, theirs, low, high",
    [
        (bt.adjust_hue, TF.adjust_hue, -0.5, 0.5),
        (bt.gaussian_blur, lambda x, sigma: TF.gaussian_blur(x, 23, sigma), 0.1, 2.0),
    ],
)
def test_hue_and_blur_are_torchvisions(ours, theirs, low, high):
    x = torch.rand(16, 3, 40, 40)
    x[:3] = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1)  # black, gray, white
    strength = torch.linspace(low, high, 16)
    actual = ours(x, strength.view(16, 1, 1, 1))
    expected = torch.stack([theirs(x[n], float(strength[n])) for n in range(16)])
    inside = (..., slice(12, -12), slice(12, -12))  # beyond, their blur mirrors the image
    torch.testing.assert_close(actual[inside], expected[inside], atol=2e-5, rtol=0)


def largest_gap(a, b):
    """Between two distribution functions, over what chance exceeds once in 10,000 pairs."""
    levels = torch.linspace(-3, 3, 1000).view(1000, 1)
    gap = (a < levels).float().mean(dim=1) - (b < levels).float().mean(dim=1)
    return gap.abs().max() / (2.2 * (2 / len(a)) ** 0.5)


def test_crops_are_distributed_as_promised():
    """On an image whose red and green tell where a pixel lies, so that a crop tells its box."""
    red = ((torch.arange(16) + 0.5) / 16).expand(16, 16)
    images = torch.stack([red, red.T, red]).expand(4000, 3, 16, 16)
    crops = bt.crop_and_flip(images, 3, (0.08, 1.0))
    x = crops[:, 0, 0]  # in the middle of the thirds of each box
    y = crops[:, 1, :, 0]
    width = 3 / 2 * (x[:, 2] - x[:, 0]).abs()
    height = 3 / 2 * (y[:, 2] - y[:, 0])
    area = width * height
    bound = (-area.log()).clamp(max=math.log(4 / 3))
    uniform = torch.linspace(0, 1, 4000)
    assert largest_gap((area - 0.08) / 0.92, uniform) < 1
    assert largest_gap((width / height).log() / bound, 2 * uniform - 1) < 1
    assert largest_gap((x[:, 1] - width / 2) / (1 - width), uniform) < 1
    assert largest_gap((y[:, 1] - height / 2) / (1 - height), uniform) < 1
    assert (x[:, 0] + x[:, 2] - 2 * x[:, 1]).abs().max() < 1e-5  # even steps, also between pixels


def test_views_are_distributed_as_torchvisions():
    bars = torch.tensor([2] * 28 + [1] * 28).expand(4, 3, 56, 56)
    images = (bars * torch.tensor([80, 60, 40]).view(3, 1, 1)).byte()
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
    blur = v2.RandomApply([v2.GaussianBlur(5, (0.1 * 56 / 224, 2.0 * 56 / 224))], 0.7)
    solarize = v2.RandomSolarize(0.5, 0.3)
    steps = [v2.RandomHorizontalFlip(), jitter, v2.RandomGrayscale(0.2), blur, solarize]
    theirs = torch.stack([v2.Compose(steps)(images[0] / 255) for _ in range(10000)])
    ours = torch.cat([bt.augment(images, 56, None, 0.7, 0.3) for _ in range(2500)])
    undo = v2.Normalize([-485 / 229, -456 / 224, -406 / 225], [1 / 0.229, 1 / 0.224, 1 / 0.225])
    numbers = []
    for views in (undo(ours), theirs):
        pixels = views[:, :, 0, [0, 27, 28, 55]]
        parts = [pixels, pixels.diff(dim=1), pixels.diff(dim=2)]
        numbers.append(torch.cat([part.flatten(1) for part in parts], dim=1).T)
    for a, b in zip(*numbers, strict=True):
        assert largest_gap(a, b) < 1
        assert a.view(-1, 4).T.corrcoef()[0, 1].abs() < 0.15  # each image draws for itself


def test_network_schedule_and_lars_are_the_authors():
    model = bt.BarlowTwins(projector="32-24-16")
    kinds = [type(layer).__name__ for layer in model.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 2 + ["Linear"]
    assert not model.backbone.layer1[0].bn2.weight.any()  # zero_init_residual, as the authors
    assert model.backbone.conv1.kernel_size == (3, 3)
    for epoch, fraction in [(0, 0), (4, 0.4), (10, 1), (55, 0.5005), (100, 0.001)]:
        assert bt.learning_rate(epoch, 100) == pytest.approx(fraction)
    assert bt.learning_rate(505, 1000) == pytest.approx(0.5005)  # 10 epochs of warm-up, no more
    w = nn.Parameter(torch.zeros(2, 2))
    w.grad = torch.ones(2, 2)
    bt.LARS([w], lr=0.5).step()
    assert (w == -0.5).all()  # where a norm is 0 LARS is SGD


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="needs torch 2.11")
@pytest.mark.parametrize("recipe", bt.RECIPES)
def test_a_step_stays_on_the_gpu_and_never_waits_for_it(recipe, monkeypatch):
    """Without a GPU on fake tensors, which have a device but no values: to read one raises."""
    order = torch.randperm(4)
    monkeypatch.setattr(torch, "randperm", lambda n: order)  # drawn on the CPU
    args = bt.parse_arguments(["--recipe", recipe])
    gpu = torch.cuda.is_available()
    with nullcontext() if gpu else FakeTensorMode():
        with torch.device("cuda"):
            model = bt.BarlowTwins(args.arch, args.projector, recipe != "resnet50")
            images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        optimizer = bt.make_optimizer(args, model)
        for mode in ("default", "error", "default"):  # the first step warms up
            if gpu:
                torch.cuda.set_sync_debug_mode(mode)
            view = bt.augment(images, args.size, blur=1.0, solarize=0.2)
            terms = bt.loss_terms(*model(view, view))
            for w in model.parameters():
                w.grad = torch.zeros_like(w)  # the backward pass asks for a real device
            optimizer.step()
    assert {x.device.type for x in [view, *terms]} == {"cuda"}


def test_judges_are_a_vote_written_out_and_as_good_as_the_best_rule():
    centres = 0.6 * torch.randn(5, 12)
    y, test_y = torch.randint(5, (2, 1200))
    x = centres[y] + torch.randn(1200, 12)
    test_x = centres[test_y] + torch.randn(1200, 12)
    cosine = torch.cosine_similarity(test_x.view(1200, 1, 12), x, dim=2)
    hundredth = cosine.sort(descending=True).values[:, 99:100]
    weight = (cosine / 0.1).exp() * (cosine >= hundredth)
    votes = torch.stack([weight[:, y == c].sum(dim=1) for c in range(5)])
    vote = float((votes.argmax(dim=0) == test_y).float().mean())
    assert bt.knn_accuracy(x, y, test_x, test_y, k=100) == pytest.approx(vote)
    best = float((torch.cdist(test_x, centres).argmin(dim=1) == test_y).float().mean())
    assert abs(bt.linear_accuracy(5000 + 300 * x, y, 5000 + 300 * test_x, test_y) - best) < 0.015


# -------------------------------------------------------------------------------- Command line
@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    root = tmp_path_factory.mktemp("images") / "DIR"  # of many kinds
    for i, image in enumerate(bt.shapes(32, seed=0)[0]):
        path = root / ("train" if i < 24 else "val") / f"класс {i % 2}" / f"{i}.tiff"
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = ["RGB", "L", "CMYK", "P"][i // 2 % 4]
        TF.to_pil_image(image).resize((40, 30 + i)).convert(mode).save(path)
    return f"--data {root} --recipe small --projector 16-16 --batch-size 12 --labels 10"


def test_cifar10_is_read_from_files_laid_out_like_the_original_ones(tmp_path, monkeypatch):
    images, labels = bt.shapes(60, seed=0)
    (tmp_path / "cifar-10-batches-py").mkdir()
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]
    for i, name in enumerate(names):
        x, y = images[10 * i :][:10], labels[10 * i :][:10]
        batch = {"data": x.flatten(1).numpy(), "labels": y.tolist(), "label_names": []}
        (tmp_path / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(batch))
    monkeypatch.setattr(bt.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    args = bt.parse_arguments(["--data", "cifar10", "--data-dir", str(tmp_path)])
    _, train_set, val_set = bt.load_data(args)
    assert torch.equal(torch.cat([train_set.tensors[0], val_set.tensors[0]]), images)
    assert torch.equal(torch.cat([train_set.tensors[1], val_set.tensors[1]]), labels)


def test_a_run_writes_what_it_promises(tmp_path):
    flags = f"--out {tmp_path} --epochs 2 --batch-size 40 --projector 256 --labels "
    bt.main((flags + "100").split())
    checkpoint = (tmp_path / "checkpoint.pt").read_bytes()
    bt.main((flags + "50").split())  # judged again
    assert (tmp_path / "checkpoint.pt").read_bytes() == checkpoint
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    events = " ".join(line["event"] for line in log)
    assert events == "config train eval train eval result config result"
    train = "event epoch step loss invariance redundancy floor lr images_per_second"
    result = "event data recipe labels epochs seconds images_per_second loss floor"
    scores = "knn linear knn_untrained linear_untrained knn_pixels linear_pixels"
    assert set(log[1]) == set(train.split())
    assert set(log[2]) == {"event", "epoch", "seconds", "knn"}
    assert set(log[-1]) == set(result.split()) | set(scores.split())
    assert log[-1]["labels"] == 50
    assert log[-1]["floor"] == bt.loss_floor(40, 256, log[0]["lambd"])
    assert 0 < log[2]["seconds"] < log[4]["seconds"] == log[-1]["seconds"]
    assert log[1]["invariance"] < 256  # the mean of four steps, each of up to 1 for a unit
    files = "backbone.pt checkpoint.pt correlation.png log.jsonl views.png"
    assert {path.name for path in tmp_path.iterdir()} == set(files.split())
    bt.small_backbone().load_state_dict(torch.load(tmp_path / "backbone.pt"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create 8 worker processes")
def test_readme_judges_weights(monkeypatch, tiny):
    monkeypatch.chdir(Path(tiny.split()[1]).parent)
    args = bt.parse_arguments(["--data", "DIR"])
    Path(args.out).mkdir(parents=True)
    torch.save(bt.build(args).backbone.state_dict(), f"{args.out}/backbone.pt")
    names = run_code_of_readme(2)
    assert names["train"][0].shape == (24, 2048)
    assert names["val"][1].tolist() == 4 * [0] + 4 * [1]


def test_training_is_the_loop_written_out(tmp_path, tiny):
    flags = f"{tiny} --recipe resnet50 --arch small --size 64 --workers 1 --seed 5 --lambd 0.1 "
    flags += f"--lr-weights 900 --lr-biases 0.1 --weight-decay 0.5 --out {tmp_path} --epochs "
    assert torchrun(3, flags + "1 --precision fp32").returncode == 0
    bt.main((flags + "2 --precision fp32").split())
    train_set = bt.load_data(bt.parse_arguments((flags + "2").split()))[0]
    torch.manual_seed(5)
    model = bt.BarlowTwins("small", "16-16").to(memory_format=torch.channels_last)
    momenta = [torch.zeros_like(w) for w in model.parameters()]
    for epoch, processes in enumerate([3, 1]):  # three that act as one; one that goes on
        order = torch.randperm(24, generator=torch.Generator().manual_seed(5 + epoch))
        views_a, views_b = [], []
        for rank in range(processes):
            torch.manual_seed(hash((5, epoch, rank)))
            part = Subset(train_set, order[rank::processes].tolist())
            for crops, _ in DataLoader(part, 12 // processes, num_workers=1):
                views_a.append(bt.augment(crops[:, 0], 64, None, blur=1.0))
                views_b.append(bt.augment(crops[:, 1], 64, None, blur=0.1, solarize=0.2))
        for step in range(2):
            warmup = 0.1 * (epoch + 1)
            done = (epoch + step / 2 - warmup) / (epoch + 1 - warmup)
            rate = 12 / 256 * (0.5005 + 0.4995 * math.cos(math.pi * done)) if done > 0 else 0
            z_a = torch.cat([model.projector(model.backbone(x)) for x in views_a[step::2]])
            z_b = torch.cat([model.projector(model.backbone(x)) for x in views_b[step::2]])
            gradients = torch.autograd.grad(algorithm_1(z_a, z_b, 0.1), list(model.parameters()))
            for w, g, m in zip(model.parameters(), gradients, momenta, strict=True):
                if w.ndim > 1:
                    g = g + 0.5 * w
                    g = g * 0.001 * w.norm() / g.norm()
                m.mul_(0.9).add_(g)
                w.data -= rate * (900 if w.ndim > 1 else 0.1) * m
    saved = torch.load(tmp_path / "checkpoint.pt")["model"]
    for name, w in model.named_parameters():
        assert relative_error(saved[name], w.detach()) < 1e-3


def torchrun(processes, flags):
    command = f"-m torch.distributed.run --standalone --nproc-per-node {processes} {bt.__file__} "
    command = [sys.executable, *(command + flags).split()]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True)


def refused(capfd, code, flags):
    with pytest.raises(SystemExit, match=code):
        bt.main(flags.split())
    sentence = capfd.readouterr().err
    assert sentence.count("\n") == 1
    return sentence


def test_a_killed_run_goes_on_and_unfit_checkpoints_are_refused(tmp_path, tiny, capfd):
    parts = f"{tiny} --epochs 30 --out {tmp_path}/parts"
    checkpoint = tmp_path / "parts/checkpoint.pt"
    bt.main(f"{tiny} --epochs 30 --out {tmp_path}/whole".split())
    with subprocess.Popen([sys.executable, bt.__file__, *parts.split()]) as victim:
        while not checkpoint.exists():
            time.sleep(0.01)
        victim.kill()
    good = checkpoint.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    runs_a_command = f"cos\nsystem\n(S'touch {tmp_path}/executed'\ntR.".encode()
    for bad in (good[:9000], flipped, runs_a_command):
        checkpoint.write_bytes(bad)
        assert "cannot load" in refused(capfd, "1", parts)
        assert checkpoint.read_bytes() == bad
    assert not (tmp_path / "executed").exists()
    checkpoint.write_bytes(good)
    assert "another lambd" in refused(capfd, "1", parts + " --lambd 2")
    bt.main(parts.split())
    expected = (tmp_path / "whole/backbone.pt").read_bytes()
    assert (tmp_path / "parts/backbone.pt").read_bytes() == expected


def test_bad_input_is_answered_with_one_sentence(tmp_path, tiny, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    bad_flags = """--epochs 0, --epochs -1, --lr-weights nan, --lambd inf, --lambd -1, --size 7,
--projector 512-, --arch vgg11, --crop-scale 1.5, --crop-scale 0, --labels 9, --optimizer adam"""
    for flag in bad_flags.split(","):
        assert flag.split()[0] in refused(capfd, "2", flag)
    names = "file empty/train/a/1.txt damaged/train/a/1.png damaged/val/a/1.png"
    for name in [*names.split(), "other/train/a/1.png", "other/val/b/1.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"not an image")
    bad_input = [
        ("--batch-size 1000000", "--batch-size"),
        ("--data nowhere", "nowhere/train"),
        ("--data empty", "train/CLASS"),
        ("--data other", "same classes"),
        ("--data damaged --recipe small --workers 1", "damaged/train/a/1.png"),
        ("--data cifar10 --data-dir file", "data-dir"),
        ("--out file/run", "file/run"),
    ]
    for flags, says in bad_input:
        assert says in refused(capfd, "1", flags)
    assert not list(tmp_path.rglob("*.pt"))
    hasty = f"{tiny} --batch-size 24 --epochs 3 --lr-weights 1e30 --out hasty"  # first rate: 0
    errors = torchrun(2, hasty).stderr
    assert "not finite in epoch 2" in errors
    assert "by peer" not in errors  # from the process that loses the other
    assert "not finite in epoch 2" in refused(capfd, "1", hasty)  # goes on alone, and so fails
    assert torch.load("hasty/checkpoint.pt")["state"]["epochs"] == 1
    Path("taken/checkpoint.part").mkdir(parents=True)
    assert "checkpoint.part" in refused(capfd, "1", f"{tiny} --out taken")
    monkeypatch.setattr(dist, "get_world_size", lambda: 5)
    assert "multiple of 5" in refused(capfd, "1", tiny)
