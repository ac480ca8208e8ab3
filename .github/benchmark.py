"""Times the parts of a training step: `python .github/benchmark.py` with flags of barlow_twins.py.

The limit is a step of the same network on views that lie ready, towards embeddings of length 0.
The last two rows make views without blur, by augment and by torchvision image by image.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import barlow_twins as bt

STEPS, WARM_UP, CUDA = 40, 5, bt.DEVICE.type == "cuda"
times = {}


def clock(name, start):
    """Notes under a name the milliseconds since start, and returns the moment."""
    if CUDA:
        torch.cuda.synchronize()
    now = time.perf_counter()
    times.setdefault(name, []).append(1000 * (now - start))
    return now


def towards_0(z_a, z_b):  # not their mean, whose gradient would vanish behind BatchNorm
    return z_a.square().mean() + z_b.square().mean()


def step(model, optimizer, view_a, view_b, loss, args):
    with torch.autocast(bt.DEVICE.type, torch.bfloat16, enabled=args.precision == "bf16"):
        z_a, z_b = model(view_a, view_b)
    optimizer.zero_grad()
    loss(z_a, z_b).backward()
    optimizer.step()


def theirs(args, solarize):
    crop = [v2.RandomResizedCrop(args.size, (args.crop_scale, 1.0)), v2.RandomHorizontalFlip()]
    jitter = v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8)
    colours = [jitter, v2.RandomGrayscale(0.2), v2.RandomSolarize(128, solarize)]
    normalize = v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    return v2.Compose([*crop, *colours, v2.ToDtype(torch.float32, scale=True), normalize])


args = bt.parse_arguments()
n = args.batch_size
images = TensorDataset(*bt.shapes(2 * n, seed=0, size=args.image_size))
model = bt.build(args)
optimizer = bt.make_optimizer(args, model)
theirs_a, theirs_b = theirs(args, 0.0), theirs(args, 0.2)
sampler = RandomSampler(images, replacement=True, num_samples=STEPS * n)
loader = iter(DataLoader(images, n, sampler=sampler, num_workers=args.workers, pin_memory=CUDA))
for _ in range(STEPS):
    start = time.perf_counter()
    batch = next(loader)[0].to(bt.DEVICE, non_blocking=True)
    view_a = bt.augment(batch, args.size, args.crop_scale, blur=1.0, solarize=0.0)
    view_b = bt.augment(batch, args.size, args.crop_scale, blur=0.1, solarize=0.2)
    step(model, optimizer, view_a, view_b, bt.barlow_twins_loss, args)
    now = clock("whole step", start)
    step(model, optimizer, view_a, view_b, towards_0, args)
    now = clock("limit", now)
    z = torch.randn(2, n, model.projector[-1].out_features, device=bt.DEVICE, requires_grad=True)
    now = time.perf_counter()
    bt.barlow_twins_loss(*z, auto=args.auto).backward()
    now = clock("loss, both ways", now)
    bt.augment(batch, args.size, args.crop_scale, solarize=0.0)
    bt.augment(batch, args.size, args.crop_scale, solarize=0.2)
    now = clock("views", now)
    for image in batch.cpu():
        theirs_a(image), theirs_b(image)
    clock("torchvision", now)
for name, values in times.items():
    print(f"{name:18} {median(values[WARM_UP:]):8.2f} ms")
pairs = zip(times["whole step"][WARM_UP:], times["limit"][WARM_UP:], strict=True)
print(f"step over limit    {median(a / b for a, b in pairs):8.3f}")
if CUDA:
    print(f"peak memory in GiB {torch.cuda.max_memory_allocated() / 2**30:8.1f}")
