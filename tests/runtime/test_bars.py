"""Where progress is shown: on a terminal, in a notebook, and not where output is thrown away."""

import io
import sys

import pytest

from corinfomax.runtime import bars


class KernelStream(io.StringIO):
    """Standard error of a notebook's kernel."""


KernelStream.__module__ = "ipykernel.iostream"


@pytest.mark.parametrize(("stream", "shown"), [(KernelStream(), True), (io.StringIO(), False)])
def test_widgets_are_shown_in_a_notebook_unless_errors_are_redirected(monkeypatch, stream, shown):
    monkeypatch.setattr(bars, "AS_WIDGET", True)
    monkeypatch.setattr(sys, "stderr", stream)
    assert bars.shown() is shown


def test_lines_go_to_standard_error_but_in_a_notebook_to_standard_output(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert bars.lines() is sys.stderr
    monkeypatch.setattr(sys, "stderr", KernelStream())
    assert bars.lines() is sys.stdout
