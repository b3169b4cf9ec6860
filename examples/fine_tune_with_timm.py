"""Fine-tune exported weights with timm, without corinfomax.

`python examples/fine_tune_with_timm.py EXPORTED IMAGES`: EXPORTED is the folder that `corinfomax export RUN` wrote;
IMAGES holds train/CLASS/… and test/CLASS/….
"""

import argparse
import json
import runpy
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

parser = argparse.ArgumentParser()
parser.add_argument("exported", type=Path)
parser.add_argument("images", type=Path)
parser.add_argument("--epochs", type=int, default=3)
args = parser.parse_args()
device = "cuda" if torch.cuda.is_available() else "cpu"

# the weights, with a new last layer
if (args.exported / "load.py").exists():  # a small stem, for which timm has no argument
    backbone = runpy.run_path(str(args.exported / "load.py"))["backbone"]()
else:
    backbone = timm.create_model(f"local-dir:{args.exported}", pretrained=True)

# the images, as the weights expect them
config = timm.data.resolve_data_config(json.loads((args.exported / "config.json").read_text())["pretrained_cfg"])
train = ImageFolder(args.images / "train", timm.data.create_transform(**config, is_training=True))
test = ImageFolder(args.images / "test", timm.data.create_transform(**config))
network = nn.Sequential(backbone, nn.Linear(backbone.num_features, len(train.classes))).to(device)

# smaller steps for what is trained already
groups = [{"params": network[0].parameters(), "lr": 1e-4}, {"params": network[1].parameters(), "lr": 1e-2}]
optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
for epoch in range(args.epochs):
    network.train()
    for images, labels in DataLoader(train, batch_size=64, shuffle=True, num_workers=2):
        loss = nn.functional.cross_entropy(network(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    network.eval()
    right = 0
    with torch.inference_mode():
        for images, labels in DataLoader(test, batch_size=64, num_workers=2):
            right += (network(images.to(device)).argmax(1).cpu() == labels).sum().item()
    print(f"epoch {epoch + 1}: {right / len(test):.1%} of {len(test)} test images")
