"""Times the parts of a training step: `python .github/benchmark.py` with flags of barlow_twins.py.

The limit is a step of the same network on views that lie ready, towards embeddings of length 0.
Images are drawn on the spot, unless --data is a folder whose files are read for every batch.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

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


args = bt.parse_arguments()
n = args.batch_size
images = TensorDataset(*bt.shapes(2 * n, seed=0, size=max(32, args.size)))
if args.from_files:
    images = bt.load_data(args)[0]
scale = None if args.from_files else (args.crop_scale, 1.0)
model = bt.build(args)
if args.compile:
    model.compile()
optimizer = bt.make_optimizer(args, model)
sampler = RandomSampler(images, replacement=True, num_samples=STEPS * n)
loader = iter(DataLoader(images, n, sampler=sampler, num_workers=args.workers, pin_memory=CUDA))
for _ in range(STEPS):
    start = clock("", time.perf_counter())
    batch = next(loader)[0].to(bt.DEVICE, non_blocking=True)
    crops_a, crops_b = batch.unbind(1) if args.from_files else (batch, batch)
    view_a = bt.augment(crops_a, args.size, scale, blur=1.0, solarize=0.0)
    view_b = bt.augment(crops_b, args.size, scale, blur=0.1, solarize=0.2)
    step(model, optimizer, view_a, view_b, bt.barlow_twins_loss, args)
    now = clock("whole step", start)
    step(model, optimizer, view_a, view_b, towards_0, args)
    now = clock("limit", now)
    z = torch.randn(2, n, model.projector[-1].out_features, device=bt.DEVICE, requires_grad=True)
    now = clock("", now)
    bt.barlow_twins_loss(*z, redundancy=args.redundancy).backward()
    clock("loss, both ways", now)
middle = {name: median(values[WARM_UP:]) for name, values in times.items() if name}
print("\n".join(f"{name:16} {value:8.2f} ms" for name, value in middle.items()))
pairs = zip(times["whole step"][WARM_UP:], times["limit"][WARM_UP:], strict=True)
result = dict(event="benchmark", recipe=args.recipe, threads=torch.get_num_threads())
result |= dict(device=torch.cuda.get_device_name() if CUDA else "cpu")
result |= dict(images_per_second=1000 * n / middle["whole step"], step_ms=middle["whole step"])
result |= dict(step_over_limit=median(a / b for a, b in pairs), limit_ms=middle["limit"])
result |= dict(loss_share=middle["loss, both ways"] / middle["whole step"])
if CUDA:
    result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
print(json.dumps(result))
