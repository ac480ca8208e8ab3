"""What the paper promises and what the command line must do, each against an independent oracle."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as TF

import barlow_twins as bt


@pytest.fixture(autouse=True)
def one_seed_one_folder_and_no_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(bt, "DEVICE", torch.device("cpu"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the processes that a test starts
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
FLAGS = "--data DIR --seed 1 --projector 16-16 --precision fp32 --batch-size 8 --lambd 0.1 "
FLAGS += "--size 34 --lr-weights 0.3 --lr-biases 3e-5 --weight-decay 1 --epochs "


def assert_near(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance, check_dtype=False)


def run_code_of_readme(block, **names):
    readme = Path(bt.__file__).with_name("README.md").read_text()
    exec(readme.split("```python\n")[block].split("```")[0], names)
    return names


# ---------------------------------------------------------------------------------------- Loss
def algorithm_1(z_a, z_b, lambd, auto=False):
    """C and the loss in float64, with BatchNorm's biased variance and eps of 1e-5."""
    z = torch.stack([z_a, z_b]).double()
    variance, mean = torch.var_mean(z, dim=1, correction=0, keepdim=True)
    a, b = (z - mean) / (variance + 1e-5).sqrt()
    c = a.T @ b / len(a)
    off_diagonal = (a.T @ a / len(a) if auto else c).clone().fill_diagonal_(0)
    return c, (1 - c.diagonal()).square().sum() + lambd * off_diagonal.square().sum()


@pytest.mark.parametrize("auto", [False, True])
@pytest.mark.parametrize("n, d", [(8, 48), (16, 16), (32, 8)])
def test_c_the_loss_and_its_gradient_are_those_of_algorithm_1(n, d, auto):
    z_a = torch.randn(n, d) @ torch.randn(d, d)
    z_b = z_a + torch.randn(n, d)
    z_a[:, 0] = 7  # a dead unit
    z = [z_a.requires_grad_(), z_b.requires_grad_()]
    c, expected = algorithm_1(*z, 0.1, auto)
    assert_near(bt.cross_correlation(*z), c)
    loss = bt.barlow_twins_loss(*z, 0.1, auto)
    assert_near(loss, expected)
    assert_near(torch.autograd.grad(loss, z), torch.autograd.grad(expected, z))
    half = [z_a.bfloat16(), z_b.bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = bt.barlow_twins_loss(*half, auto=auto)
    assert_near(loss, algorithm_1(*half, 0.0051, auto)[1])


@pytest.mark.parametrize("auto", [False, True])
def test_c_and_the_loss_have_the_properties_of_correlations(auto):
    z = torch.randn(2, 16, 8, requires_grad=True)
    assert_near(bt.cross_correlation(z[0], z[0]).diagonal(), torch.ones(8), 1e-4)
    c = bt.cross_correlation(z[0], z[1])
    assert_near(c, bt.cross_correlation(z[1], z[0]).T)
    assert c.abs().max() <= 1
    loss = bt.barlow_twins_loss(*z, 0.1, auto)
    images = z[:, torch.randperm(16)]
    units = z[:, :, torch.randperm(8)]
    moved = z * (0.5 + torch.rand(2, 1, 8)) + torch.randn(2, 1, 8)
    for pair in (images, units, moved):
        assert_near(bt.barlow_twins_loss(*pair, 0.1, auto), loss, 1e-4)
    gradient = torch.autograd.grad(loss, z)[0]
    assert_near(gradient.sum(dim=1), torch.zeros(2, 8))
    assert_near((gradient * z).sum(dim=1), torch.zeros(2, 8), 1e-4)
    a, b = z.detach()[:, :5]  # fewer images than units
    without_c = run_code_of_readme(2, a=a, b=b)
    assert_near(without_c["squares"], (a.T @ b / 5).square().sum())
    assert_near(without_c["diagonal"], (a.T @ b / 5).diagonal())
    decorrelated = torch.linalg.qr(z[0] - z[0].mean(dim=0)).Q
    repeated = z[0, :, :1].expand(16, 8)
    for x, value in [(decorrelated, 0.0), (torch.ones(16, 8), 8.0), (repeated, 0.1 * 8 * 7)]:
        assert_near(bt.barlow_twins_loss(x, x, 0.1, auto), torch.tensor(value), 1e-4)
    for a, b in [(z[0], z[1, :, 1:]), (z[0], z[1, 1:]), (z, z), (z[0, :1], z[1, :1])]:
        with pytest.raises(ValueError, match=r"must both be \(N, D\)"):
            bt.barlow_twins_loss(a, b, 0.1, auto)


@pytest.mark.parametrize("lambd", [0.0051, 0.1])
def test_descent_on_the_embeddings_ends_at_the_floor(lambd):
    z = torch.randn(2, 32, 64, requires_grad=True)
    for _ in range(1000):
        loss = bt.barlow_twins_loss(*z, lambd)
        z.data -= 10 * torch.autograd.grad(loss, z)[0]
    excess = 64 / (32 - 1) - 1  # C has rank 31 at most
    assert 1 - 1e-5 <= loss / (lambd * 64 * excess / (1 + lambd * excess)) <= 1 + 1e-3


def gradient_of_part(rank, world_size, folder, model, x):
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    net = torch.nn.parallel.DistributedDataParallel(model)
    z_a, z_b = net(x.chunk(world_size, dim=1)[rank])
    bt.barlow_twins_loss(bt.gather_batch(z_a), bt.gather_batch(z_b)).backward()
    torch.save(model.weight.grad, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.parametrize("world_size", [2, 3])
def test_many_processes_act_as_one(world_size, tmp_path):
    x = torch.randn(2, 12, 12) + torch.arange(12).view(12, 1) // 4  # the processes' means differ
    model = torch.nn.Linear(12, 16)
    torch.multiprocessing.spawn(gradient_of_part, (world_size, tmp_path, model, x), world_size)
    bt.barlow_twins_loss(*model(x)).backward()
    for rank in range(world_size):
        assert_near(torch.load(tmp_path / str(rank)), model.weight.grad)


# ---------------------------------------------------------------- Views, evaluation, training
def test_views_are_torchvisions_image_by_image(monkeypatch):
    """Image n draws n / 39 of the way from the lowest to the highest value, whatever it draws."""
    monkeypatch.setattr(bt, "uniform", lambda x, *ab: torch.linspace(*ab, len(x)).view(-1, 1, 1, 1))
    monkeypatch.setattr(bt, "random_resized_crop", lambda x, size, scale: x)
    monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).flip(0))
    images = torch.randint(256, (40, 3, 56, 56), dtype=torch.uint8)
    views = bt.augment(images, 56, None, blur=0.7, solarize=0.3)
    for n, x in enumerate(images / 255):
        part = n / 39
        if part < 0.5:
            x = TF.horizontal_flip(x)
        if part < 0.8:
            x = TF.adjust_hue(x, -0.1 + 0.2 * part)
            x = TF.adjust_saturation(x, 0.8 + 0.4 * part)
            x = TF.adjust_contrast(x, 0.6 + 0.8 * part)
            x = TF.adjust_brightness(x, 0.6 + 0.8 * part)
        if part < 0.2:
            x = TF.rgb_to_grayscale(x, 3)
        if part < 0.7:
            x = TF.gaussian_blur(x, 23, (0.1 + 1.9 * part) * 56 / 224)
        if part < 0.3:
            x = TF.solarize(x, 0.5)
        x = TF.normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        assert_near(views[n, :, 3:-3, 3:-3], x[:, 3:-3, 3:-3], 1e-4)  # their blur mirrors a border


def test_crops_are_uniform_in_area_ratio_and_place():
    """On an image whose red and green tell where a pixel lies, so that a crop tells its box."""
    red = ((torch.arange(16) + 0.5) / 16).expand(16, 16)
    crops = bt.random_resized_crop(torch.stack([red, red.T, red]).expand(4000, 3, 16, 16), 3, 0.08)
    left, x, right = crops[:, 0, 0].T  # in the middle of the thirds of each box
    top, y, bottom = crops[:, 1, :, 0].T
    width = 1.5 * (right - left)
    height = 1.5 * (bottom - top)
    area = (width * height - 0.08) / (0.75 - 0.08)
    ratio = 0.5 + 0.5 * (width / height).log() / torch.tensor(4 / 3).log()
    x = (x - width / 2) / (1 - width)
    y = (y - height / 2) / (1 - height)
    fits = area < 1  # beyond, some are cut
    numbers = torch.stack([area, ratio, x, y])[:, fits]
    levels = torch.linspace(0, 1, 11)
    assert_near(numbers.quantile(levels, dim=1), levels.view(11, 1).expand(11, 4), 0.04)
    assert_near(numbers.corrcoef(), torch.eye(4), 0.1)
    assert_near(fits.float().mean(), torch.tensor(0.67 / 0.92), 0.03)
    assert torch.maximum(width, height).max() < 1.001
    white = torch.ones(64, 3, 4, 4)  # also at its border
    assert_near(bt.random_resized_crop(white, 8, 0.08), white.repeat(1, 1, 2, 2))


def test_judges_are_a_vote_written_out_and_as_good_as_the_best_rule():
    centres = 0.6 * torch.randn(5, 12)
    y, test_y = torch.randint(5, (2, 1200))
    x = centres[y] + torch.randn(1200, 12)
    test_x = centres[test_y] + torch.randn(1200, 12)
    cosine = torch.cosine_similarity(test_x.view(1200, 1, 12), x, dim=2)
    least = cosine.sort(descending=True).values[:, 23:24]  # of the k = 1200 / 50 nearest
    votes = ((cosine / 0.1).exp() * (cosine >= least)) @ torch.eye(5)[y]
    vote = (votes.argmax(dim=1) == test_y).float().mean().item()
    assert bt.knn_accuracy(x, y, test_x, test_y) == pytest.approx(vote)
    best = (torch.cdist(test_x, centres).argmin(dim=1) == test_y).float().mean().item()
    assert abs(bt.linear_accuracy(5 + x / 300, y, 5 + test_x / 300, test_y) - best) < 0.015


@pytest.mark.skipif(not hasattr(torch.cpu, "get_capabilities"), reason="needs torch 2.11")
@pytest.mark.parametrize("recipe", bt.RECIPES)
def test_a_step_stays_on_the_gpu_and_never_waits_for_it(recipe, monkeypatch):
    """On fake tensors, which have a device but no values: to read one raises."""
    order = torch.randperm(4)
    monkeypatch.setattr(torch, "randperm", lambda n: order)  # drawn on the CPU
    args = bt.parse_arguments(["--recipe", recipe])
    with FakeTensorMode():
        with torch.device("cuda"):
            model = bt.BarlowTwins(args.arch, args.projector, args.image_size <= bt.SMALL_SIDE)
            images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
        view = bt.augment(images, args.size, args.crop_scale, blur=1.0, solarize=0.2)
        loss = bt.barlow_twins_loss(*model(view, view), args.lambd)
        for w in model.parameters():
            w.grad = torch.zeros_like(w)  # the backward pass asks for a real device
        bt.make_optimizer(args, model).step()
    assert loss.device.type == "cuda"


@pytest.fixture
def drawings(tmp_path):
    """400 images to train on and 80 to validate, in the order of ImageFolder, and their files."""
    images, labels = bt.shapes(480, seed=0)
    order = (labels + 10 * (torch.arange(480) >= 400)).argsort(stable=True)
    images, labels = images[order], labels[order]
    for n, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = tmp_path / "DIR" / ("train" if n < 400 else "val") / f"{label}/{n:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        TF.to_pil_image(image).save(path)
    return images, labels


def test_a_killed_run_goes_on_and_is_the_loop_written_out(drawings):
    subprocess.run([*TORCHRUN, bt.__file__, *FLAGS.split(), "1"], check=True)
    checkpoint = Path("runs/DIR-small/checkpoint.pt")
    with subprocess.Popen([sys.executable, bt.__file__, *FLAGS.split(), "9"]) as victim:
        while victim.poll() is None and torch.load(checkpoint)["epochs"] == 1:
            time.sleep(0.01)
        victim.kill()
    assert torch.load(checkpoint)["epochs"] == 2
    bt.main([*FLAGS.split(), "3"])
    images, labels = drawings
    torch.manual_seed(1)
    model = bt.BarlowTwins("small", "16-16", small_images=True)
    assert " ".join(type(x).__name__ for x in model.projector) == "Linear BatchNorm1d ReLU Linear"
    moments = [(5, 1000), (10, 1000), (505, 1000), (1000, 1000), (0.15, 3)]  # (epoch, epochs)
    assert [bt.learning_rate(*x) for x in moments] == pytest.approx([0.5, 1, 0.5005, 0.001, 0.5])
    momenta = [torch.zeros_like(w) for w in model.parameters()]
    for epoch, (processes, epochs) in enumerate([(2, 1), (1, 9), (1, 3)]):
        drawn = torch.randperm(400, generator=torch.Generator().manual_seed(1_000_000 + epoch))
        views = []
        for rank in range(processes):
            torch.manual_seed(1_000_000 + 1000 * epoch + rank)
            for batch in DataLoader(images[drawn[rank::processes]], 8 // processes):
                view_a = bt.augment(batch, 34, 0.4, blur=1.0, solarize=0.0)
                view_b = bt.augment(batch, 34, 0.4, blur=0.1, solarize=0.2)
                views.append((view_a, view_b))
        for step in range(50):
            z_a, z_b = zip(*[model(*pair) for pair in views[step::50]], strict=True)
            _, loss = algorithm_1(torch.cat(z_a), torch.cat(z_b), 0.1)
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            rate = 8 / 256 * bt.learning_rate(epoch + step / 50, epochs)
            for w, g, m in zip(model.parameters(), gradients, momenta, strict=True):
                if w.ndim > 1:
                    g = g + w.data
                    g = g * 0.001 * w.data.norm() / g.norm()
                m.mul_(0.9).add_(g)
                w.data -= rate * (0.3 if w.ndim > 1 else 3e-5) * m
    saved = torch.load(checkpoint)["model"]
    for name, w in model.named_parameters():
        assert_near(saved[name], w.data, 5e-6)
    files = "backbone.pt checkpoint.pt correlation.png log.jsonl views.png"
    assert " ".join(sorted(path.name for path in checkpoint.parent.iterdir())) == files
    log = [json.loads(line) for line in Path("runs/DIR-small/log.jsonl").read_text().splitlines()]
    last = ["epoch 3.00", "epoch 3", "raw pixels", "untrained", "trained"]
    assert [line["what"] for line in log[-5:]] == last
    assert log[-5]["loss"] == pytest.approx(loss.item(), rel=1e-3)
    readme = run_code_of_readme(1, __name__="__main__")  # judges backbone.pt
    assert log[-1] == {"what": "trained", **readme["scores"]}
    backbone = readme["backbone"].train()
    whole_batches = bt.batches(readme["val_set"], readme["args"])
    features, val_labels = bt.extract_features(backbone, whole_batches)
    whole = TF.normalize(images[400:] / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert_near(features, backbone.eval()(whole).data)
    assert torch.equal(val_labels, labels[400:])


def test_what_does_not_fit_is_refused(drawings, tmp_path, monkeypatch):
    flags = f"{FLAGS} 3 --batch-size 400 --lr-weights 1e30 --out "

    def refused(says, more=""):
        with pytest.raises(BaseException, match=says):
            bt.main(f"{flags} 0 {more}".split())
        dist.destroy_process_group()

    refused("nowhere/train", "--data nowhere")
    refused("at most 400 images", "--batch-size 500")
    refused("not finite")  # by the only step of the second epoch
    assert torch.load("0/checkpoint.pt")["epochs"] == 1
    refused("another lambd", "--lambd 2")
    two = [*TORCHRUN, "--no-python", "sh", "-c", f"{sys.executable} {bt.__file__} {flags} $RANK"]
    assert "one folder" in subprocess.run(two, stderr=subprocess.PIPE, text=True).stderr
    Path("0/checkpoint.pt").write_bytes(f"cos\nsystem\n(S'touch {tmp_path}/run'\ntR.".encode())
    refused("cannot load 0/checkpoint.pt: Weights only load failed")
    assert not Path("run").exists()
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    refused("multiple of 3")
    Path("DIR/train/0/damaged.png").write_bytes(b"P6 9 9 255 ")  # without its pixels
    refused("0/damaged.png")
    Path("DIR/val/9").rename("DIR/val/other")
    refused("same classes")


def test_lars_is_sgd_where_a_norm_is_0():
    w = torch.nn.Parameter(torch.zeros(2, 2))
    w.grad = torch.ones(2, 2)
    bt.LARS([w], lr=0.5).step()
    assert_near(w.data, torch.full((2, 2), -0.5))
