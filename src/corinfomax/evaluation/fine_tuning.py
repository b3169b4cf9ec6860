"""Training with labels: the published linear probe, and fine-tuning with few labels."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from corinfomax.evaluation import probes
from corinfomax.evaluation.features import extract_features
from corinfomax.images.cache import Images
from corinfomax.network import autocast, images_at_once
from corinfomax.recipes.fields import Recipe, View
from corinfomax.runtime import bars, memory
from corinfomax.runtime.devices import sent
from corinfomax.runtime.seeds import generator, key
from corinfomax.views import operations

HEAD_LR = {0.01: 0.4, 0.1: 0.8}  # by share of labels, × the linear probe's: its 25 on ImageNet-1K gives 10 and 20
BACKBONE_LR = 0.005
TUNING_EPOCHS, TUNING_BATCH = 20, 256
FEWEST_STEPS = 400  # 1 % of ImageNet-1K takes 1,000; twenty epochs of forty images would be twenty steps


def linear_probe(
    model: nn.Module,
    train: Images,
    test: Images,
    recipe: Recipe,
    *,
    device: torch.device,
    log: Callable[[str], object] = lambda line: None,
) -> Int[Tensor, " m"]:
    """Predictions of the published linear probe, `recipe.probe`, after its last epoch.

    One linear layer on frozen features of randomly cropped and flipped images, by SGD with momentum 0.9 and no weight
    decay; the last batch of an epoch may be shorter. `log` gets a line after each epoch. Raises FloatingPointError if
    it diverges.
    """
    assert test.labels is not None
    probe, crop = recipe.probe, View(crop_area=(0.08, 1.0), jitter=0.0, grey=0.0)
    x_test = extract_features(model.eval(), test, recipe, device=device).to(device)
    y_test = test.labels.to(device)

    # The head and its optimiser.
    torch.manual_seed(key(recipe.seed, "probe weights"))
    head = nn.Linear(x_test.shape[1], len(train.classes)).to(device)
    optimizer = torch.optim.SGD(head.parameters(), lr=probe.lr, momentum=0.9)

    at_once = images_at_once(model, recipe, device, side=recipe.test_side, most=probe.batch)
    for epoch in range(probe.epochs):
        # A cosine, or ten times lower every few epochs.
        if probe.decay_epochs is None:
            lr = probe.min_lr + (probe.lr - probe.min_lr) * (1 + math.cos(math.pi * epoch / probe.epochs)) / 2
        else:
            lr = probe.lr * 0.1 ** (epoch // probe.decay_epochs)

        title = f"linear probe, epoch {epoch + 1} of {probe.epochs}"
        for x, y in _batches(train, crop, recipe, "probe", epoch, probe.batch, device, title, drop_last=False):
            with torch.no_grad(), autocast(recipe, device):
                features = torch.cat([model(part).float() for part in x.split(at_once)])
            _step(optimizer, [F.cross_entropy(head(features), y)], lr)

        with torch.no_grad():
            logits = head(x_test)
            loss = F.cross_entropy(logits, y_test)
        if not loss.isfinite():
            raise FloatingPointError(f"the linear probe diverged at learning rate {probe.lr:g}; try a lower one")
        hits = logits.topk(min(5, len(train.classes))).indices == y_test[:, None]
        top1, top5 = (100 * float(found.double().mean()) for found in (hits[:, 0], hits.any(1)))
        log(f"{title}: loss {loss:.3f}, top-1 {top1:.2f} %, top-5 {top5:.2f} %")
    return head(x_test).argmax(1).cpu()


def fine_tune(
    backbone: nn.Module, train: Images, test: Images, recipe: Recipe, *, share: float, device: torch.device
) -> Int[Tensor, " m"]:
    """Predictions of a copy of the whole network, trained on a `share` of each class's labels.

    The published semi-supervised protocol: 20 epochs of batches of 256 by SGD without weight decay; the learning rates
    of the new head and of the backbone fall to 0.1 and 0.2 of themselves at each quarter. Four changes suit any data:
    each class gives at least one image; fewer images than a batch form one batch, at the same rates, since it has no
    noise to average out; there are at least FEWEST_STEPS steps; the head's rate is HEAD_LR times the linear probe's, in
    keeping with the features' scale. Images are cropped, flipped and rotated as in pretraining, in their own colours.
    Raises FloatingPointError if it diverges.
    """
    assert train.labels is not None
    labelled = train.select(labelled_share(train.labels, share, recipe.seed))
    epochs = max(TUNING_EPOCHS, math.ceil(FEWEST_STEPS / max(1, len(labelled) // TUNING_BATCH)))
    crop = replace(recipe.views[0], jitter=0.0, grey=0.0, blur=0.0, solarize=0.0)
    title = f"fine-tuning on {len(labelled)} labels"

    # The copy and its head, from zeros: a random head's first gradients would disturb the backbone.
    model = copy.deepcopy(backbone).train()
    torch.manual_seed(key(recipe.seed, "fine-tuning weights"))
    width = extract_features(model, test.select(torch.arange(1)), recipe, device=device).shape[1]
    head = nn.Linear(width, len(train.classes)).to(device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    head_lr = HEAD_LR[share] * recipe.probe.lr
    optimizer = torch.optim.SGD([{"params": net.parameters()} for net in (head, model)], lr=head_lr, momentum=0.9)

    chunks = _chunks(nn.Sequential(model, head), recipe, device)
    for epoch in range(epochs):
        quarter = 4 * epoch // epochs
        for x, y in _batches(labelled, crop, recipe, "fine-tuning", epoch, TUNING_BATCH, device, title, drop_last=True):
            losses = _losses(nn.Sequential(model, head), x, y, recipe, chunks)
            _step(optimizer, losses, head_lr * 0.1**quarter, BACKBONE_LR * 0.2**quarter)

    if not all(weights.isfinite().all() for weights in (*head.parameters(), *model.parameters())):
        raise FloatingPointError(f"fine-tuning diverged at learning rates {head_lr:g} and {BACKBONE_LR:g}")
    return head.cpu()(extract_features(model, test, recipe, device=device)).argmax(1)


def _chunks(model: nn.Module, recipe: Recipe, device: torch.device) -> int:
    """Chunks of a batch, one if its gradient fits into half of the free memory; BatchNorm sees a chunk at a time."""
    side = recipe.test_side

    def both_ways(count: int) -> None:
        x = torch.zeros(count, recipe.pixels.channels, side, side, device=device).to(memory_format=torch.channels_last)
        with autocast(recipe, device):
            model(x).float().sum().backward()

    model.eval()  # so that BatchNorm's statistics stay
    bytes_per_image = memory.growth(both_ways)
    model.train().zero_grad(set_to_none=True)
    fitting = max(2.0, memory.room(device) / 2 // bytes_per_image)
    return math.ceil(TUNING_BATCH / fitting)


def _losses(
    model: nn.Module, x: Float[Tensor, "n c s s"], y: Int[Tensor, " n"], recipe: Recipe, chunks: int
) -> Iterator[Float[Tensor, ""]]:
    """The mean cross-entropy as a sum over chunks of the batch, each with two images at least."""
    chunks = max(1, min(chunks, len(x) // 2))
    for images, labels in zip(x.tensor_split(chunks), y.tensor_split(chunks), strict=True):
        with autocast(recipe, x.device):
            logits = model(images).float()
        yield F.cross_entropy(logits, labels) * (len(labels) / len(y))


def labelled_share(labels: Int[Tensor, " n"], share: float, seed: int) -> Int[Tensor, " k"]:
    """Rows with a share of each class, at least one, drawn by `seed`; a larger share contains a smaller one."""
    most = (labels.bincount() * share).round().clamp_min(1)
    return (probes.rank_in_class(labels, generator(seed, "labelled share")) < most[labels]).nonzero()[:, 0]


def _batches(
    images: Images,
    view: View,
    recipe: Recipe,
    purpose: str,
    epoch: int,
    batch: int,
    device: torch.device,
    title: str,
    *,
    drop_last: bool,
) -> Iterator[tuple[Float[Tensor, "b 3 s s"], Int[Tensor, " b"]]]:
    """Views and labels of each batch of an epoch, a random view of each image at the test resolution.

    The pixels of the next batch are read meanwhile. `drop_last` leaves out a last batch that is shorter, unless it is
    the only one.
    """
    assert images.labels is not None
    batches = torch.randperm(len(images), generator=generator(recipe.seed, f"{purpose} order", epoch)).split(batch)
    kept = batches[: max(1, len(images) // batch)] if drop_last else batches
    first = epoch * len(kept)
    bar = bars.tqdm(kept, title, unit="step", leave=False, disable=not bars.shown())
    with ThreadPoolExecutor(1, thread_name_prefix="probe") as pool:
        following = pool.submit(images.batch, kept[0])
        for number, indices in enumerate(bar):
            pixels, sizes = following.result()
            if number + 1 < len(kept):
                following = pool.submit(images.batch, kept[number + 1])
            rng = generator(recipe.seed, f"{purpose} view", first + number)
            parameters = operations.draw(view, sizes, rng, recipe.pixels)
            pixels, labels = (sent(tensor, device) for tensor in (pixels, images.labels[indices]))
            x = operations.apply(pixels, sizes, parameters, size=recipe.test_side, scaling=recipe.scaling)
            yield x, labels


def _step(optimizer: torch.optim.Optimizer, losses: Iterable[Float[Tensor, ""]], *rates: float) -> None:
    """A step of SGD on the sum of the losses, each group at its learning rate."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    optimizer.zero_grad()
    for loss in losses:
        loss.backward()
    optimizer.step()
