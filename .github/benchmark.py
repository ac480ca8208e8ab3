"""Times the parts of a training step: `python .github/benchmark.py` with flags of barlow_twins.py.

The limit is a step of the same network on views that lie ready, towards embeddings of length 0.
Images are drawn on the spot, unless --data is a folder whose files are read for every batch.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import barlow_twins as bt

STEPS, WARM_UP, CUDA = 40, 5, torch.cuda.is_available()


class Clock(list):
    """Moments with their names; on a GPU it notes them without waiting."""

    def __call__(self, name):
        moment = torch.cuda.Event(enable_timing=True) if CUDA else time.perf_counter()
        if CUDA:
            moment.record()
        self.append((name, moment))

    def milliseconds(self):
        if not CUDA:
            return {name: 1000 * (end - start) for (_, start), (name, end) in pairwise(self)}
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) for (_, start), (name, end) in pairwise(self)}


def step(net, optimizer, views, loss, args, clock):
    with torch.autocast(views[0].device.type, torch.bfloat16, enabled=args.precision == "bf16"):
        z_a, z_b = net(*views)
    clock("forward")
    value = loss(z_a, z_b)
    clock("loss")
    optimizer.zero_grad()
    value.backward()
    clock("backward")
    optimizer.step()
    clock("optimizer")


args, device = bt.parse_arguments(), torch.device("cuda" if CUDA else "cpu")
n, rows = args.batch_size, []
if args.from_files:
    images, _ = bt.load_data(args, device)
else:
    images = bt.shapes(2 * n, 0, max(32, args.size))[0].to(device)
model, net, optimizer, augment_a, augment_b = bt.build(args, device)
order = torch.arange(STEPS * n, device=device).remainder(len(images)).split(n)
loader = bt.batches(images, order, device, args.workers)
for _ in range(STEPS):
    whole, limit, alone = Clock(), Clock(), Clock()
    whole("start")
    crops_a, crops_b = next(loader)
    whole("load")
    views = augment_a(crops_a), augment_b(crops_b)
    whole("views")
    step(net, optimizer, views, bt.barlow_twins_loss, args, whole)
    limit("start")
    # Not the mean of the embeddings, whose gradient would vanish behind BatchNorm.
    step(net, optimizer, views, lambda *z: sum(x.square().mean() for x in z), args, limit)
    z = torch.randn(2, n, model.projector[-1].out_features, device=device, requires_grad=True)
    alone("start")
    bt.barlow_twins_loss(*z, redundancy=args.redundancy).backward()
    alone("loss, both ways")
    row = whole.milliseconds() | alone.milliseconds()
    row["whole step"] = sum(whole.milliseconds().values())
    rows.append(row | {"limit": sum(limit.milliseconds().values())})
print(f"{'milliseconds':>16}  median  lowest highest")
times = {name: [row[name] for row in rows[WARM_UP:]] for name in rows[0]}
for name, values in times.items():
    print(f"{name:>16} {median(values):7.1f} {min(values):7.1f} {max(values):7.1f}")
ratio = median(row["whole step"] / row["limit"] for row in rows[WARM_UP:])
step_ms, loss_ms = median(times["whole step"]), median(times["loss, both ways"])
name = torch.cuda.get_device_name() if CUDA else "cpu"
result = dict(event="benchmark", recipe=args.recipe, device=name, threads=torch.get_num_threads())
result |= dict(images_per_second=1000 * n / step_ms, step_ms=step_ms, step_over_limit=ratio)
result |= dict(limit_ms=median(times["limit"]), loss_share=loss_ms / step_ms)
if CUDA:
    result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
print(json.dumps(result))
