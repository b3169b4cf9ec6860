"""Random views of a whole batch at once: parameters drawn per image from a Generator, then applied by pure functions.

Images are planar: uint8 (n, 3, h, w) in, float32 in [0, 1] between the operations, normalised and channels_last out.
A batch of mixed sizes comes zero-padded, each image at the top left, with its own (height, width) beside it.
Each operation gives what torchvision gives for the same parameters on a float image. A CPU does them in `fused`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from corinfomax.recipes.fields import View
from corinfomax.views import cpu

CHUNK = 2**21  # pixel values resampled at once on a CPU: 8 MiB of float32
ON_GPU = 2**27  # and elsewhere, where each chunk is a hundred launches: 512 MiB
CROP_TRIES = 10  # torchvision's: draw a box up to ten times, then fall back to a centre crop
BLUR_RADIUS = 6  # three times the largest published sigma, 2 px; 0.3 % of that kernel's weight lies beyond
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
GREY = (0.2989, 0.587, 0.114)


class Parameters(NamedTuple):
    """What was drawn for each of n images; all on the CPU, so that choosing images by them never waits for a device."""

    angle: Float[Tensor, " n"]
    """Rotation, degrees counter-clockwise."""
    box: Int[Tensor, "n 4"] | Float[Tensor, "n 4"]
    """Crop: top, left, height, width in pixels; of pixels that it covers in part all are read."""
    flip: Bool[Tensor, " n"]
    jitter: Bool[Tensor, " n"]
    order: Int[Tensor, "n 4"]
    """Which part of the jitter comes first, second, …: BRIGHTNESS, CONTRAST, SATURATION or HUE."""
    factors: Float[Tensor, "n 4"]
    """Brightness, contrast and saturation factors, and the hue's shift in turns."""
    grey: Bool[Tensor, " n"]
    blur: Bool[Tensor, " n"]
    sigma: Float[Tensor, " n"]
    """Blur's standard deviation, pixels of the view."""
    solarize: Bool[Tensor, " n"]

    def take(self, indices: Int[Tensor, " m"] | slice) -> Parameters:
        """The parameters of some of the images, such as one process's slice of the global batch."""
        return Parameters(*(field[indices] for field in self))


def draw(view: View, sizes: Int[Tensor, "n 2"], generator: torch.Generator) -> Parameters:
    """One view's parameters for n images of the given (height, width); everything random about a view is here."""
    n = len(sizes)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape).uniform_(low, high, generator=generator)

    def chance(p: float) -> Tensor:
        return torch.rand(n, generator=generator) < p

    around_one = [(max(0.0, 1 - spread), 1 + spread) for spread in (view.brightness, view.contrast, view.saturation)]
    return Parameters(
        angle=uniform(-view.rotate, view.rotate),
        box=_draw_boxes(view, sizes, generator),
        flip=chance(view.flip),
        jitter=chance(view.jitter),
        order=torch.rand(n, 4, generator=generator).argsort(1),
        factors=torch.stack([uniform(low, high) for low, high in (*around_one, (-view.hue, view.hue))], 1),
        grey=chance(view.grey),
        blur=chance(view.blur),
        sigma=uniform(*view.blur_sigma),
        solarize=chance(view.solarize),
    )


def _draw_boxes(view: View, sizes: Int[Tensor, "n 2"], generator: torch.Generator) -> Int[Tensor, "n 4"]:
    """Random resized crop as torchvision draws it: the first of ten boxes that fits, else the largest centre crop."""
    n = len(sizes)
    height, width = sizes[:, :1], sizes[:, 1:]
    low, high = view.crop_ratio
    area = height * width * torch.empty(n, CROP_TRIES).uniform_(*view.crop_area, generator=generator)
    ratio = torch.empty(n, CROP_TRIES).uniform_(math.log(low), math.log(high), generator=generator).exp()
    w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)
    shift = torch.rand(n, 2, generator=generator)
    top, left = ((room + 1) * share for room, share in zip((height - h, width - w), shift.split(1, 1), strict=True))

    whole_ratio = width / height
    h_centre = torch.where(whole_ratio < low, (width / low).round(), height).long().clamp(min=1)
    w_centre = torch.where(whole_ratio > high, (height * high).round(), width).long().clamp(min=1)
    drawn = torch.cat((top.floor().long(), left.floor().long(), h, w), 1)
    centre = torch.cat(((height - h_centre) // 2, (width - w_centre) // 2, h_centre, w_centre), 1)
    return torch.where(fits.any(1, keepdim=True), drawn, centre)


def apply(
    images: UInt8[Tensor, "n 3 h w"],
    sizes: Int[Tensor, "n 2"],
    p: Parameters,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Tensor, "n 3 {size} {size}"]:
    """The views that `p` describes, `size`×`size`, on the images' device, normalised, channels_last."""
    if images.device.type != "cpu" or images.dtype != torch.uint8:
        return compose(images, sizes, p, size=size, mean=mean, std=std)
    corner, extent = p.box.split(2, 1)
    window = cpu.Window(corner.double(), extent.double(), *_covered(p.box), p.flip)
    changes = cpu.Changes(
        angle=p.angle.deg2rad(),
        part=torch.where(p.jitter[:, None], p.order, -1),
        factor=p.factors.gather(1, p.order),
        grey=p.grey,
        blur=p.blur,
        kernel=blur_kernel(p.sigma, size),
        solarize=p.solarize,
    )
    return cpu.run(images, sizes, window, changes, size=size, mean=mean, std=std)


def compose(
    images: UInt8[Tensor, "n 3 h w"],
    sizes: Int[Tensor, "n 2"],
    p: Parameters,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Tensor, "n 3 {size} {size}"]:
    """What `apply` gives, operation by operation, on any device."""
    x = rotate(images.float() / 255, sizes, p.angle) if (p.angle != 0).any() else images
    x = resized_crop(x, p.box, p.flip, size=size)
    x = jitter(x, p)
    x = _on(p.grey, x, lambda x: grey(x).expand_as(x))
    x = _on(p.blur, x, blur, p.sigma)
    x = _on(p.solarize, x, solarize)
    return normalize(x, mean=mean, std=std)


def rotate(
    x: Float[Tensor, "n 3 h w"], sizes: Int[Tensor, "n 2"], angle: Float[Tensor, " n"]
) -> Float[Tensor, "n 3 h w"]:
    """Each image turned by `angle` degrees counter-clockwise about its own centre, bilinear, black outside."""
    n, _, h, w = x.shape
    radians = angle.deg2rad()
    cos, sin = radians.cos(), radians.sin()
    centre_y, centre_x = ((sizes - 1) / 2).unbind(1)
    to_output = torch.tensor([2 / w, 2 / h])  # pixels to grid_sample's −1 … 1
    # Where output pixel (column i, row j) comes from: turn (i − cx, j − cy) back, about the centre.
    turn = torch.stack((torch.stack((cos, -sin), 1), torch.stack((sin, cos), 1)), 1)
    centre = torch.stack((centre_x, centre_y), 1)
    turn, centre, to_output = (tensor.to(x.device, non_blocking=True) for tensor in (turn, centre, to_output))
    rows, columns = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
    pixels = torch.stack((columns, rows), -1).reshape(1, h * w, 2) - centre[:, None]
    source = pixels @ turn.mT + centre[:, None]
    grid = ((source + 0.5) * to_output - 1).reshape(n, h, w, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def resized_crop(
    x: UInt8[Tensor, "n 3 h w"] | Float[Tensor, "n 3 h w"],
    box: Int[Tensor, "n 4"] | Float[Tensor, "n 4"],
    flip: Bool[Tensor, " n"],
    *,
    size: int,
) -> Float[Tensor, "n 3 {size} {size}"]:
    """Each image's box (top, left, height, width) as a square of `size`, antialiased bicubic, some flipped; in [0, 1].

    uint8 is 0 … 255, float is 0 … 1. Nothing outside the box is read.
    """
    start, extent = box[:, :2].float(), box[:, 2:].float()
    return _resample(x, start, extent, *_covered(box), flip, size=size)


def _covered(box: Int[Tensor, "n 4"] | Float[Tensor, "n 4"]) -> tuple[Int[Tensor, "n 2"], Int[Tensor, "n 2"]]:
    """The first pixel of each box and the one after its last."""
    corner, extent = box[:, :2], box[:, 2:]
    return corner.floor().long(), (corner + extent).ceil().long()


def centre_view(
    images: UInt8[Tensor, "n 3 h w"],
    sizes: Int[Tensor, "n 2"],
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Tensor, "n 3 {size} {size}"]:
    """The test view: short side resized to ⌊8/7·size⌋, antialiased bicubic, then the centre square; normalised."""
    # Resize and crop are one linear map, so the resized image is never made.
    resized = (size * 8 // 7) * sizes // sizes.min(1, keepdim=True).values
    scale = sizes / resized
    start = ((resized - size) / 2).round() * scale
    never, zeros = torch.zeros(len(sizes), dtype=torch.bool), torch.zeros_like(sizes)
    if images.device.type == "cpu" and images.dtype == torch.uint8:
        window = cpu.Window(start.double(), (size * scale).double(), zeros, sizes, never)
        return cpu.run(images, sizes, window, cpu.unchanged(len(sizes)), size=size, mean=mean, std=std)
    return normalize(_resample(images, start, size * scale, zeros, sizes, never, size=size), mean=mean, std=std)


def _resample(
    x: Tensor, start: Tensor, extent: Tensor, low: Tensor, high: Tensor, flip: Tensor, *, size: int
) -> Tensor:
    """The window (start, extent) of each image as a square of `size`; only pixels in [low, high) are read; in [0, 1].

    Arguments are (n, 2): vertical, horizontal. Cubic resampling is separable: two batched matrix products.
    """
    n, _, h, w = x.shape
    most = max(1, (CHUNK if x.device.type == "cpu" else ON_GPU) // (3 * h * w))
    if n > most:  # large images: float copies of the whole batch would go through memory, again and again
        parts = (tensor.split(most) for tensor in (x, start, extent, low, high, flip))
        return torch.cat([_resample(*some, size=size) for some in zip(*parts, strict=True)])
    scale = 255.0 if x.dtype == torch.uint8 else 1.0
    taps = cubic_taps(extent, size=size)  # before anything is moved: reading it from a device would make the host wait
    windows = torch.stack((start, extent, low, high)).to(x.device, torch.float32, non_blocking=True)
    vertical = cubic_weights(*windows[:, :, 0], length=h, size=size, taps=taps[0]) / scale
    horizontal = cubic_weights(*windows[:, :, 1], length=w, size=size, taps=taps[1])
    flip = flip.to(x.device, non_blocking=True)
    horizontal = torch.where(flip[:, None, None], horizontal.flip(1), horizontal)
    # Rows outermost, then channels: then both products are plain bmm and nothing is copied between them.
    rows = x.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).reshape(n, h * 3, w)
    rows = torch.bmm(rows, horizontal.mT).reshape(n, h, 3 * size)
    return torch.bmm(vertical, rows).reshape(n, size, 3, size).transpose(1, 2).contiguous().clamp_(0, 1)


def cubic_taps(extent: Float[Tensor, "n 2"], *, size: int) -> tuple[int, int]:
    """How many pixels of a line and a row at most take part in one of `size` pixels made from `extent` ones."""
    vertical, horizontal = (math.ceil(4 * max(float(most) / size, 1.0)) + 1 for most in extent.amax(0))
    return vertical, horizontal


def cubic_weights(
    start: Float[Tensor, " n"],
    extent: Float[Tensor, " n"],
    low: Float[Tensor, " n"],
    high: Float[Tensor, " n"],
    *,
    length: int,
    size: int,
    taps: int,
) -> Float[Tensor, "n {size} {length}"]:
    """Antialiased bicubic resampling of pixels [start, start+extent) of a line to `size` pixels, as matrices.

    Keys' cubic with a = −1/2, widened by the scale when it shrinks, cut off at [low, high) and normalised: the filter
    of Pillow and of torch's `interpolate(antialias=True)`. Its few `taps` (see `cubic_taps`) are computed and put into
    place; the rest of each matrix is zero.
    """
    scale = (extent / size)[:, None]
    widened = scale.clamp(min=1)
    centre = start[:, None] + scale * (torch.arange(size, device=start.device) + 0.5)
    first = (centre - 2 * widened + 0.5).floor_()
    pixels = first[:, :, None] + torch.arange(taps, device=start.device)
    t = ((pixels + 0.5 - centre[:, :, None]) / widened[:, :, None]).abs_()
    # Without branches: (2−t)₊² (1−t) / 2 is the outer piece, and the inner one is that plus (1−t)₊² (2t−1).
    rest = 1 - t
    weights = (2 - t).clamp_(min=0).square_().mul_(rest).mul_(0.5)
    weights.addcmul_(rest.clamp_(min=0).square_(), t.mul_(2).sub_(1))
    inside = (pixels >= low[:, None, None]) & (pixels < high[:, None, None])
    weights.mul_(inside)
    weights.div_(weights.sum(2, keepdim=True))
    # Taps outside weigh nothing: wherever they are put, they add zero.
    places = pixels.clamp_(0, length - 1).long()
    return weights.new_zeros(len(weights), size, length).scatter_add_(2, places, weights)


def jitter(x: Float[Tensor, "n 3 h w"], p: Parameters) -> Float[Tensor, "n 3 h w"]:
    """Brightness, contrast, saturation and hue of the images in `p.jitter`, in each one's own order."""
    for place in range(4):
        part = torch.where(p.jitter, p.order[:, place], -1)
        factor = p.factors.gather(1, p.order[:, place : place + 1])[:, 0]
        x = blend(x, part, factor)
        x = _on(part == HUE, x, hue, factor)
    return x


def blend(
    x: Float[Tensor, "n 3 h w"], part: Int[Tensor, " n"], factor: Float[Tensor, " n"]
) -> Float[Tensor, "n 3 h w"]:
    """Brightness, contrast or saturation of each image by its factor, clamped to [0, 1]; other parts leave it alone.

    Each is `factor` times the image plus the rest of black, of the mean grey or of the grey image: one pass does all.
    """
    factor = torch.where((part == BRIGHTNESS) | (part == CONTRAST) | (part == SATURATION), factor, 1)
    keep, of_mean, of_grey = (
        _per_image(share, x)
        for share in (factor, (1 - factor) * (part == CONTRAST), (1 - factor) * (part == SATURATION))
    )
    luma = grey(x)
    rest = torch.addcmul(of_mean * luma.mean((2, 3), keepdim=True), luma, of_grey)
    return torch.addcmul(rest, x, keep).clamp_(0, 1)


def hue(x: Float[Tensor, "n 3 h w"], shift: Float[Tensor, " n"]) -> Float[Tensor, "n 3 h w"]:
    """Each image's hue turned by `shift` turns.

    With V the largest channel, C the chroma and H the hue in sixths of a turn, HSV back to RGB is
    V − C + C · clamp(|H−3|−1, 2−|H−2|, 2−|H−4|) for red, green, blue.
    """
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    numerator = torch.where(value == red, green - blue, torch.where(value == green, blue - red, red - green))
    sector = torch.where(value == red, 0.0, torch.where(value == green, 2.0, 4.0))
    # Grey has no hue: 0 times a large number.
    sixths = torch.addcmul(sector, numerator, chroma.clamp_min(1e-30).reciprocal_()) + 6 * _per_image(shift, x)[:, 0]
    sixths.sub_(6 * (sixths / 6).floor_())
    out = torch.empty_like(x)
    torch.sub(sixths, 3, out=out[:, 0]).abs_().sub_(1)
    torch.sub(sixths, 2, out=out[:, 1]).abs_().neg_().add_(2)
    torch.sub(sixths, 4, out=out[:, 2]).abs_().neg_().add_(2)
    return out.clamp_(0, 1).mul_(chroma[:, None]).add_((value - chroma)[:, None])


def grey(x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
    """Luma of each image, ITU-R BT.601."""
    red, green, blue = x.split(1, 1)
    return (GREY[0] * red).add_(green, alpha=GREY[1]).add_(blue, alpha=GREY[2])


def blur(x: Float[Tensor, "n 3 s s"], sigma: Float[Tensor, " n"]) -> Float[Tensor, "n 3 s s"]:
    """Gaussian blur of each square image with its own sigma in pixels, reflected at the border.

    The kernel's radius is 3 times the largest sigma of the published views whatever is drawn, so that an image's
    result does not depend on the others in its batch.
    """
    n, _, size, _ = x.shape
    kernel = blur_kernel(sigma, size).to(x.device, non_blocking=True)
    taps = torch.arange(kernel.shape[1], device=x.device) - kernel.shape[1] // 2
    # One linear map a line with the border folded in: pixel i takes its tap k from pixel reflect(i + k).
    pixels = torch.arange(size, device=x.device)
    source = (pixels + taps[:, None]).abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    spread = (source[:, :, None] == pixels).float().reshape(len(taps), size * size)
    lines = (kernel @ spread).reshape(n, size, size)
    rows = torch.bmm(x.transpose(1, 2).reshape(n, size * 3, size), lines.mT).reshape(n, size, 3 * size)
    return torch.bmm(lines, rows).reshape(n, size, 3, size).transpose(1, 2).contiguous()


def blur_kernel(sigma: Float[Tensor, " n"], size: int) -> Float[Tensor, "n k"]:
    """The blur's weights for each image's sigma, in the order of their taps −r … r."""
    radius = min(BLUR_RADIUS, size - 1)
    taps = torch.arange(-radius, radius + 1)
    return torch.softmax(-0.5 * (taps / sigma[:, None]).square(), 1)


def solarize(x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Every value at or above 128 of 255 inverted."""
    return torch.where(x >= 128 / 255, 1 - x, x)


def normalize(
    x: Float[Tensor, "n 3 h w"], *, mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Tensor, "n 3 h w"]:
    """(x − mean) / std for each channel, channels_last, as convolutions like it best."""
    shift, scale = torch.tensor((mean, std)).to(x.device, non_blocking=True)[:, :, None, None]
    return ((x - shift) / scale).contiguous(memory_format=torch.channels_last)


def _per_image(values: Float[Tensor, " n"], x: Tensor) -> Float[Tensor, "n 1 1 1"]:
    return values.to(x.device, non_blocking=True)[:, None, None, None]


def _on(chosen: Bool[Tensor, " n"], x: Tensor, operation: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """`operation(images, *values)` on the chosen images with their own values, the others untouched."""
    indices = chosen.nonzero()[:, 0]
    if len(indices) == 0:
        return x
    if len(indices) == len(x):
        return operation(x, *values)
    on_device = indices.to(x.device, non_blocking=True)
    return x.index_copy(0, on_device, operation(x[on_device], *(value[indices] for value in values)))
