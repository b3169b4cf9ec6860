"""Random views of a batch: draw parameters for each image, then apply them with pure functions.

Images enter as uint8 or uint16 (n, c, h, w), are float32 in [0, 1] between the operations, and leave normalised,
channels_last. In a batch of mixed sizes each image stands at the top left of a frame of zeros, and `sizes` holds its
(height, width). With the same parameters every operation equals torchvision's on a float image. Operations on colours
leave the channels alone that are none; these have a brightness and a contrast of their own.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from corinfomax.recipes.fields import RGB, PixelFormat, Recipe, Scaling, View
from corinfomax.runtime.devices import sent
from corinfomax.views import cpu
from corinfomax.views.cpu import BRIGHTNESS, CONTRAST, HUE, LUMA, SATURATION, Levels, Sizes

CPU_CHUNK = 2**21  # pixel values resampled at once on a CPU: 8 MiB of float32
GPU_CHUNK = 2**27  # and on a GPU, where each chunk costs a hundred launches: 512 MiB
CROP_TRIES = 10  # torchvision draws a box up to ten times, then falls back to a centre crop
BLUR_RADIUS = 6  # three times the largest published sigma, 2 px; 0.3 % of that kernel's weight lies beyond


class ViewParameters(NamedTuple):
    """Random parameters of one view of n images, all on the CPU: selecting images by them never waits for a GPU."""

    angle: Float[Tensor, " n"]  # rotation, degrees counter-clockwise
    box: Num[Tensor, "n 4"]  # top, left, height, width in pixels; pixels that it covers only partly are read too
    flip: Bool[Tensor, " n"]
    jitter: Bool[Tensor, " n"]
    order: Int[Tensor, "n 4"]  # BRIGHTNESS, CONTRAST, SATURATION and HUE in the order of application
    factors: Float[Tensor, "n 4"]  # brightness, contrast and saturation factors, and the shift of the hue in turns
    grey: Bool[Tensor, " n"]
    blur: Bool[Tensor, " n"]
    sigma: Float[Tensor, " n"]  # standard deviation of the blur, pixels of the view
    solarize: Bool[Tensor, " n"]
    own: Float[Tensor, "n c 2"]  # brightness and contrast factors of each channel that is no colour

    def take(self, indices: Int[Tensor, " m"] | slice) -> "ViewParameters":
        """Select images, such as one process's share of the batch."""
        return ViewParameters(*(field[indices] for field in self))


def draw(view: View, sizes: Sizes, generator: torch.Generator, pixels: PixelFormat = RGB) -> ViewParameters:
    """Draw everything random about one view of n images, whose `sizes` are (height, width)."""
    n = len(sizes)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.empty(n, *shape).uniform_(low, high, generator=generator)

    def chance(p: float) -> Tensor:
        return torch.rand(n, generator=generator) < p

    # The generator is read in the order of these lines: to move one changes every view.
    ranges = [(max(0.0, 1 - spread), 1 + spread) for spread in (view.brightness, view.contrast, view.saturation)]
    return ViewParameters(
        angle=uniform(-view.rotate, view.rotate),
        box=_draw_boxes(view, sizes, generator),
        flip=chance(view.flip),
        jitter=chance(view.jitter),
        order=torch.rand(n, 4, generator=generator).argsort(1),
        factors=torch.stack([uniform(low, high) for low, high in (*ranges, (-view.hue, view.hue))], 1),
        grey=chance(view.grey),
        blur=chance(view.blur),
        sigma=uniform(*view.blur_sigma),
        solarize=chance(view.solarize),
        own=torch.stack([uniform(low, high, pixels.other_channels) for low, high in ranges[:2]], 2),
    )


def _draw_boxes(view: View, sizes: Sizes, generator: torch.Generator) -> Int[Tensor, "n 4"]:
    """Boxes of torchvision's RandomResizedCrop: the first of ten that fits, else the largest centre crop."""
    n, height, width = len(sizes), sizes[:, :1], sizes[:, 1:]
    low, high = view.crop_ratio

    # ten boxes an image: area uniform, ratio of width to height log-uniform
    area = height * width * torch.empty(n, CROP_TRIES).uniform_(*view.crop_area, generator=generator)
    ratio = torch.empty(n, CROP_TRIES).uniform_(math.log(low), math.log(high), generator=generator).exp()
    w, h = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()

    # the first that fits, at a random position
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)
    shift = torch.rand(n, 2, generator=generator)
    top = ((height - h + 1) * shift[:, :1]).floor().long()
    left = ((width - w + 1) * shift[:, 1:]).floor().long()

    # else the largest centre crop of an allowed ratio
    image_ratio = width / height
    h_centre = torch.where(image_ratio < low, (width / low).round(), height).long().clamp(min=1)
    w_centre = torch.where(image_ratio > high, (height * high).round(), width).long().clamp(min=1)
    centre = torch.cat(((height - h_centre) // 2, (width - w_centre) // 2, h_centre, w_centre), 1)
    return torch.where(fits.any(1, keepdim=True), torch.cat((top, left, h, w), 1), centre)


def apply(
    images: Levels, sizes: Sizes, p: ViewParameters, *, size: int, scaling: Scaling
) -> Float[Tensor, "n c {size} {size}"]:
    """Views of `size`×`size` pixels, as the parameters say: on the images' device, normalised, channels_last.

    Compiled code makes them on a CPU and raises ValueError for a box that leaves its image; elsewhere `compose` does.
    """
    if images.device.type != "cpu":
        return compose(images, sizes, p, size=size, scaling=scaling)

    window = (p.box[:, :2].double(), p.box[:, 2:].double(), *_covered_pixels(p.box))
    adjustments, factors = torch.where(p.jitter[:, None], p.order, -1), p.factors.gather(1, p.order)
    colour = (adjustments, factors, p.own, p.grey, p.blur, blur_kernel(p.sigma, size), p.solarize)
    plan = cpu.ViewPlan(*window, p.flip, p.angle.deg2rad(), *colour)
    return cpu.apply_plan(images, sizes, plan, size=size, scaling=scaling)


def compose(
    images: Levels, sizes: Sizes, p: ViewParameters, *, size: int, scaling: Scaling
) -> Float[Tensor, "n c {size} {size}"]:
    """The views of `apply`, one operation after another on the whole batch, on any device."""
    x = rotate(images.float(), sizes, p.angle) if (p.angle != 0).any() else images
    x = jitter(resized_crop(x, p.box, p.flip, size=size, steps=scaling.steps), p)
    x = _apply_where(p.grey, x, _on_colours(lambda rgb: grey(rgb).expand_as(rgb), scaling.colours))
    x = _apply_where(p.blur, x, blur, p.sigma)
    x = _apply_where(p.solarize, x, _on_colours(solarize, scaling.colours))
    return normalize(x, mean=scaling.mean, std=scaling.std)


def centre_view(
    images: Levels,
    sizes: Sizes,
    *,
    size: int,
    scaling: Scaling,
    interpolation: Literal["bicubic", "bilinear"] = "bicubic",
) -> Float[Tensor, "n c {size} {size}"]:
    """The test view: short side resized to ⌊8/7·size⌋, antialiased, then the centre square; normalised."""
    # Resize and crop are one linear map, so the resized image is never made.
    resized = (size * 8 // 7) * sizes // sizes.min(1, keepdim=True).values
    scale = sizes / resized
    start, extent, zeros = ((resized - size) / 2).round() * scale, size * scale, torch.zeros_like(sizes)
    if images.device.type == "cpu" and interpolation == "bicubic":
        # resample alone: no flip, no angle, no change of colour
        off, ones = torch.zeros(len(images), dtype=torch.bool), torch.ones(len(images), 4)
        own = torch.ones(len(images), images.shape[1] - scaling.colours, 2)
        colour = (torch.full((len(images), 4), -1), ones, own, off, off, ones[:, :1], off)
        plan = cpu.ViewPlan(start.double(), extent.double(), zeros, sizes, off, off.float(), *colour)
        return cpu.apply_plan(images, sizes, plan, size=size, scaling=scaling)

    windows, linear = torch.stack((start, extent, zeros, sizes)), interpolation == "bilinear"
    x = _resample(images, windows, zeros[:, 0] > 0, size=size, steps=scaling.steps, linear=linear)
    return normalize(x, mean=scaling.mean, std=scaling.std)


def test_view(images: Levels, sizes: Sizes, recipe: Recipe, device: torch.device) -> Float[Tensor, "n c s s"]:
    """The centre view of a recipe, as features, scores and exports see the images."""
    filtered = recipe.interpolation
    return centre_view(images.to(device), sizes, size=recipe.test_side, scaling=recipe.scaling, interpolation=filtered)


def _apply_where(chosen: Bool[Tensor, " n"], x: Tensor, operation: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Apply `operation(images, *values)` to the chosen images, each with its own values."""
    indices = chosen.nonzero()[:, 0]
    if len(indices) == 0:
        return x
    if len(indices) == len(x):
        return operation(x, *values)
    on_device = sent(indices, x.device)
    return x.index_copy(0, on_device, operation(x[on_device], *(value[indices] for value in values)))


def _on_colours(operation: Callable[[Tensor], Tensor], colours: int) -> Callable[[Tensor], Tensor]:
    """`operation` on the first `colours` channels of images."""

    def on_colours(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        if colours in (0, x.shape[1]):
            return operation(x) if colours else x
        return torch.cat((operation(x[:, :colours]), x[:, colours:]), 1)

    return on_colours


def rotate(x: Float[Tensor, "n c h w"], sizes: Sizes, angle: Float[Tensor, " n"]) -> Float[Tensor, "n c h w"]:
    """Turn each image by `angle` degrees counter-clockwise about its own centre, bilinear, black outside."""
    n, _, h, w = x.shape
    cos, sin = angle.deg2rad().cos(), angle.deg2rad().sin()
    turn = torch.stack((cos, -sin, sin, cos), 1).view(n, 2, 2)
    centre = ((sizes - 1) / 2).flip(1)  # column, row
    to_grid = torch.tensor([2 / w, 2 / h])  # pixels to grid_sample's −1 … 1
    turn, centre, to_grid = (sent(tensor, x.device) for tensor in (turn, centre, to_grid))

    # the point of the image that lands on column i, row j: (i − cx, j − cy) turned back about the centre
    rows, columns = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
    pixels = torch.stack((columns, rows), -1).reshape(1, h * w, 2) - centre[:, None]
    source = pixels @ turn.mT + centre[:, None]
    grid = ((source + 0.5) * to_grid - 1).reshape(n, h, w, 2)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def resized_crop(
    x: Num[Tensor, "n c h w"],
    box: Num[Tensor, "n 4"],
    flip: Bool[Tensor, " n"],
    *,
    size: int,
    steps: Sequence[int],
) -> Float[Tensor, "n c {size} {size}"]:
    """Resample each image's box (top, left, height, width) to `size`×`size`, antialiased bicubic; flip if chosen.

    Takes levels from 0 to `steps` of each channel and gives 0 … 1. Nothing outside the box is read.
    """
    windows = torch.stack((box[:, :2].float(), box[:, 2:].float(), *_covered_pixels(box)))
    return _resample(x, windows, flip, size=size, steps=steps)


def _covered_pixels(box: Num[Tensor, "n 4"]) -> tuple[Int[Tensor, "n 2"], Int[Tensor, "n 2"]]:
    """First pixel of each box, and the end of its pixels, exclusive."""
    corner, extent = box[:, :2], box[:, 2:]
    return corner.floor().long(), (corner + extent).ceil().long()


def _resample(
    x: Num[Tensor, "n c h w"],
    windows: Float[Tensor, "4 n 2"],
    flip: Bool[Tensor, " n"],
    *,
    size: int,
    steps: Sequence[int],
    linear: bool = False,
) -> Float[Tensor, "n c {size} {size}"]:
    """Resample a window of each image to `size`×`size` pixels in [0, 1]: two batched matrix products.

    `windows` are start, extent, low and high, each vertical and horizontal; only pixels in [low, high) are read.
    """
    n, c, h, w = x.shape
    most = max(1, (CPU_CHUNK if x.device.type == "cpu" else GPU_CHUNK) // (c * h * w))
    if n > most:  # one float copy of a batch of large images would go through memory again and again
        chunks = zip(x.split(most), windows.split(most, 1), flip.split(most), strict=True)
        return torch.cat([_resample(*chunk, size=size, steps=steps, linear=linear) for chunk in chunks])

    # most source pixels behind a pixel; before the move, as reading them from a GPU would make the host wait
    taps = [math.ceil(4 * max(float(extent) / size, 1.0)) + 1 for extent in windows[1].amax(0)]

    # a matrix for each direction; the vertical one maps levels to [0, 1]
    windows, flip = (sent(tensor, x.device) for tensor in (windows, flip))
    vertical = _filter_matrices(windows[:, :, 0], h, size, taps[0], linear=linear) / steps[0]
    horizontal = _filter_matrices(windows[:, :, 1], w, size, taps[1], linear=linear)
    horizontal = torch.where(flip[:, None, None], horizontal.flip(1), horizontal)
    x = _apply_matrices(x, vertical, horizontal)
    if len(set(steps)) > 1:
        x *= sent(steps[0] / torch.tensor(steps), x.device)[:, None, None]
    return x.clamp_(0, 1)


def _apply_matrices(x: Tensor, vertical: Float[Tensor, "n s h"], horizontal: Float[Tensor, "n s w"]) -> Tensor:
    """Multiply the columns of each image by one matrix and its rows by another."""
    (n, c, h, w), s = x.shape, vertical.shape[1]
    # Rows outermost, then channels: both products are plain bmm, and nothing is copied between them.
    rows = x.transpose(1, 2).to(torch.float32, memory_format=torch.contiguous_format).reshape(n, h * c, w)
    rows = torch.bmm(rows, horizontal.mT).reshape(n, h, c * s)
    return torch.bmm(vertical, rows).reshape(n, s, c, s).transpose(1, 2).contiguous()


def _filter_matrices(
    windows: Float[Tensor, "4 n"], length: int, size: int, taps: int, *, linear: bool
) -> Float[Tensor, "n size length"]:
    """Matrices that resample pixels [start, start + extent) of each line to `size` pixels, antialiased.

    `windows` are start, extent, low and high of n lines of `length` pixels. Keys' cubic with a = −1/2, or a triangle if
    `linear`, widened by the scale when it shrinks, cut off at [low, high) and normalised: the filters of Pillow and of
    torch's `interpolate(antialias=True)`. Only `taps` pixels of a line are computed and scattered into place; the rest
    is zero.
    """
    # distance t of each tap from the centre of its pixel, in units of the filter
    start, extent, low, high = windows
    scale = (extent / size)[:, None]
    widened = scale.clamp(min=1)
    centre = start[:, None] + scale * (torch.arange(size, device=start.device) + 0.5)
    first = (centre - 2 * widened + 0.5).floor_()
    pixels = first[:, :, None] + torch.arange(taps, device=start.device)
    t = ((pixels + 0.5 - centre[:, :, None]) / widened[:, :, None]).abs_()

    # Without branches: (2−t)₊² (1−t) / 2 is the cubic's outer piece, and its inner one is that plus (1−t)₊² (2t−1).
    rest = 1 - t
    if linear:
        weights = rest.clamp_(min=0)
    else:
        weights = (2 - t).clamp_(min=0).square_().mul_(rest).mul_(0.5)
        weights.addcmul_(rest.clamp_(min=0).square_(), t.mul_(2).sub_(1))

    weights.mul_((pixels >= low[:, None, None]) & (pixels < high[:, None, None]))
    weights.div_(weights.sum(2, keepdim=True))

    # Taps outside weigh nothing: anywhere in the matrix they add zero.
    places = pixels.clamp_(0, length - 1).long()
    return weights.new_zeros(len(weights), size, length).scatter_add_(2, places, weights)


def jitter(x: Float[Tensor, "n c h w"], p: ViewParameters) -> Float[Tensor, "n c h w"]:
    """Adjust brightness, contrast, saturation and hue of the images in `p.jitter`, in the order of each."""
    others = p.own.shape[1]
    rgb, apart = x.split((x.shape[1] - others, others), 1)
    own = sent(p.own, x.device)
    for place in range(4):
        adjustment = torch.where(p.jitter, p.order[:, place], -1)
        if rgb.shape[1]:
            factor = p.factors.gather(1, p.order[:, place : place + 1])[:, 0]
            rgb = _apply_where(adjustment == HUE, blend(rgb, adjustment, factor), hue, factor)
        if others:
            apart = blend_apart(apart, adjustment, own)
    return torch.cat((rgb, apart), 1) if others else rgb


def blend_apart(
    x: Float[Tensor, "n c h w"], adjustment: Int[Tensor, " n"], own: Float[Tensor, "n c 2"]
) -> Float[Tensor, "n c h w"]:
    """Adjust brightness or contrast of each channel by its own factor, clamped to [0, 1]; ignore the rest.

    Each is `factor` · channel + (1 − `factor`) · 0 or the channel's mean.
    """
    of_mean, of_black = (_per_image((adjustment == kind).float(), x) for kind in (CONTRAST, BRIGHTNESS))
    brightness, contrast = own[:, :, :1, None], own[:, :, 1:, None]
    factor = 1 + of_black * (brightness - 1) + of_mean * (contrast - 1)
    rest = of_mean * (1 - factor) * x.mean((2, 3), keepdim=True)
    return torch.addcmul(rest, x, factor).clamp_(0, 1)


def blend(
    x: Float[Tensor, "n 3 h w"], adjustment: Int[Tensor, " n"], factor: Float[Tensor, " n"]
) -> Float[Tensor, "n 3 h w"]:
    """Adjust brightness, contrast or saturation of each image by its factor, clamped to [0, 1]; ignore the rest.

    Each is `factor` · image + (1 − `factor`) · black, mean grey or grey image: one pass does all three.
    """
    factor = torch.where((adjustment == BRIGHTNESS) | (adjustment == CONTRAST) | (adjustment == SATURATION), factor, 1)
    of_mean = _per_image((1 - factor) * (adjustment == CONTRAST), x)
    of_grey = _per_image((1 - factor) * (adjustment == SATURATION), x)
    luma = grey(x)
    rest = torch.addcmul(of_mean * luma.mean((2, 3), keepdim=True), luma, of_grey)
    return torch.addcmul(rest, x, _per_image(factor, x)).clamp_(0, 1)


def hue(x: Float[Tensor, "n 3 h w"], shift: Float[Tensor, " n"]) -> Float[Tensor, "n 3 h w"]:
    """Turn the hue of each image by `shift` turns.

    With V the largest channel, C the chroma and H the hue in sixths of a turn, HSV back to RGB is
    V − C + C · clamp(|H−3|−1, 2−|H−2|, 2−|H−4|) for red, green, blue.
    """
    # RGB to V, C and H
    red, green, blue = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    numerator = torch.where(value == red, green - blue, torch.where(value == green, blue - red, red - green))
    sector = torch.where(value == red, 0.0, torch.where(value == green, 2.0, 4.0))

    # shift H; grey has no hue: 0 times a large number
    sixths = torch.addcmul(sector, numerator, chroma.clamp_min(1e-30).reciprocal_()) + 6 * _per_image(shift, x)[:, 0]
    sixths.sub_(6 * (sixths / 6).floor_())

    # back to RGB
    out = torch.empty_like(x)
    torch.sub(sixths, 3, out=out[:, 0]).abs_().sub_(1)
    torch.sub(sixths, 2, out=out[:, 1]).abs_().neg_().add_(2)
    torch.sub(sixths, 4, out=out[:, 2]).abs_().neg_().add_(2)
    return out.clamp_(0, 1).mul_(chroma[:, None]).add_((value - chroma)[:, None])


def grey(x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
    """Luma of each image, ITU-R BT.601."""
    red, green, blue = x.split(1, 1)
    return (LUMA[0] * red).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def blur(x: Float[Tensor, "n c s s"], sigma: Float[Tensor, " n"]) -> Float[Tensor, "n c s s"]:
    """Blur each square image with a Gaussian of its own sigma in pixels, reflected at the border.

    One linear map a line, with the border folded in: pixel i takes tap k from pixel reflect(i + k).
    """
    n, _, size, _ = x.shape
    kernel = sent(blur_kernel(sigma, size), x.device)
    taps = torch.arange(kernel.shape[1], device=x.device) - kernel.shape[1] // 2

    # each image's kernel as a matrix over the pixels of a line
    pixels = torch.arange(size, device=x.device)
    source = (pixels + taps[:, None]).abs()
    source = torch.where(source >= size, 2 * (size - 1) - source, source)
    spread = (source[:, :, None] == pixels).float().reshape(len(taps), size * size)
    matrix = (kernel @ spread).reshape(n, size, size)
    return _apply_matrices(x, matrix, matrix)


def blur_kernel(sigma: Float[Tensor, " n"], size: int) -> Float[Tensor, "n k"]:
    """Weights of the blur for each sigma, taps −r … r; one radius for every sigma, so that a view stands alone."""
    radius = min(BLUR_RADIUS, size - 1)
    taps = torch.arange(-radius, radius + 1)
    return torch.softmax(-0.5 * (taps / sigma[:, None]).square(), 1)


def solarize(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Invert every value at or above 128 of 255."""
    return torch.where(x >= 128 / 255, 1 - x, x)


def normalize(x: Float[Tensor, "n c h w"], *, mean: Sequence[float], std: Sequence[float]) -> Float[Tensor, "n c h w"]:
    """(x − mean) / std of each channel; channels_last, the memory format that convolutions prefer."""
    shift, scale = sent(torch.tensor((mean, std)), x.device)[:, :, None, None]
    return ((x - shift) / scale).contiguous(memory_format=torch.channels_last)


def _per_image(values: Float[Tensor, " n"], x: Tensor) -> Float[Tensor, "n 1 1 1"]:
    return sent(values, x.device)[:, None, None, None]
