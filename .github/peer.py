"""Trains the network of barlow_twins.py for so many seconds by lightly's transform and loss:

pip install lightly==1.6.0; python .github/peer.py SECONDS --data DIR --seed 0
"""

import sys
import time
from pathlib import Path

import torch
from lightly.loss import BarlowTwinsLoss
from lightly.transforms.byol_transform import BYOLTransform, BYOLView1Transform, BYOLView2Transform
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import barlow_twins as bt

seconds = float(sys.argv[1])
args = bt.parse_arguments(sys.argv[2:])
options = dict(input_size=args.size, min_scale=args.crop_scale, gaussian_blur=0.0)
transform = BYOLTransform(BYOLView1Transform(**options), BYOLView2Transform(**options))


def make_views(images):
    views_a, views_b = zip(*[transform(image) for image in images], strict=True)
    return torch.stack(views_a), torch.stack(views_b)


images = [bt.read_image(path) for path, _ in ImageFolder(f"{args.data}/train").samples]
model = bt.build(args)
optimizer = bt.make_optimizer(args, model)
criterion = BarlowTwinsLoss(lambda_param=args.lambd)
options = dict(num_workers=2, persistent_workers=True, collate_fn=make_views)
loader = DataLoader(images, args.batch_size, shuffle=True, drop_last=True, **options)
done = steps = 0
started = time.monotonic()
while done < 1:
    for view_a, view_b in loader:
        done = (time.monotonic() - started) / seconds
        if done >= 1:
            break
        factor = args.batch_size / 256 * bt.learning_rate(done * args.epochs, args.epochs)
        optimizer.param_groups[0]["lr"] = args.lr_weights * factor
        optimizer.param_groups[1]["lr"] = args.lr_biases * factor
        with torch.autocast("cpu", torch.bfloat16, enabled=args.precision == "bf16"):
            z_a, z_b = model(view_a, view_b)
        loss = criterion(z_a.float(), z_b.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps += 1
print(f"{steps * args.batch_size / seconds:.0f} images/s", flush=True)
train_set, val_set = bt.load_data(args)
print(bt.evaluate(args, model.backbone, bt.subset(train_set, args.labels), val_set))
