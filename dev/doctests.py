"""Extension of griffe for the site: examples in docstrings, lines after `>>>`, become blocks of code."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^>>>.*\n?)(?:^\S.*\n?)*", re.MULTILINE)  # up to an empty line


class Doctests(griffe.Extension):
    """Fences the examples of every docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(
                lambda example: f"```pycon\n{example[0].rstrip()}\n```\n", obj.docstring.value
            )
