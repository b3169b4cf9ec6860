"""Everything the doctor says about a set of images, as one record that prints itself."""

from html import escape
from typing import NamedTuple

from corinfomax.checkup.findings import Finding
from corinfomax.images.files import some


class Checkup(NamedTuple):
    """The images as they are, their problems, and the forecast of training on them."""

    splits: tuple[str, ...]  # a line about each: images, classes and sizes
    findings: tuple[Finding, ...]
    recipe: str  # the recipe that suits them, with the reason
    forecast: str  # time of training, or why it does not fit into memory; empty if it was not timed
    cache_bytes: int
    skip: frozenset[str]  # paths to leave out, the previous list included
    skip_lines: tuple[str, ...]  # a list of them with reasons, for --skip; empty if there is nothing to skip
    remaining: int  # training images without those to leave out
    colours: dict[str, list[float]]  # `mean` and `std` of red, green and blue, if all vary

    @property
    def ok(self) -> bool:
        """True if nothing would stop training or falsify its scores."""
        return self.remaining > 1 and not any(finding.must_fix for finding in self.findings)

    def lines(self) -> list[str]:
        """The record as it is printed, a sentence a line."""
        remarks = [f"{'to fix' if finding.must_fix else 'remark'}: {finding.text}" for finding in self.findings]
        lines = [*self.splits, *(remarks or ["nothing is wrong with these images"]), f"recipe {self.recipe}"]
        lines += [self.forecast] if self.forecast else []
        lines.append(f"the cached images take {self.cache_bytes / 1e6:,.0f} MB of disk")
        if self.remaining < 2:
            lines.append(f"no command to train: {some(self.remaining, 'training image')} would be left")
        return lines

    def __repr__(self) -> str:
        return "\n".join(self.lines())

    def _repr_html_(self) -> str:
        return "\n".join(f'<div style="max-width: 90ch">{escape(line)}</div>' for line in self.lines())
