"""The page of a run."""

from __future__ import annotations

from corinfomax.cli import inputs
from corinfomax.cli.options import Report
from corinfomax.report import gather
from corinfomax.weights import checkpoint


def run(command: Report) -> int:
    """Write the page of a run."""
    if not command.run.is_dir():
        raise ValueError(f"{command.run} is no folder; name that of a run: corinfomax report RUN")
    device = inputs.device_of(command.where.device)
    network, saved = checkpoint.load_network(command.run)
    where = inputs.where_it_was(command.where, command.run, saved.facts)
    splits = inputs.load(command.data or saved.facts["data"], where, saved.recipe)
    same = splits.train.fingerprint == saved.facts["fingerprint"]
    if not same:
        print("these are not the images that the run was trained on: the page has no contact sheet of its views")
    subject = gather.Subject(command.run, network, saved.recipe, saved.step, saved.facts, splits, same)
    out = gather.write(subject, command.out or command.run / "report.html", device=device)
    print(f"report: {out}, {out.stat().st_size / 1e6:.1f} MB")
    return 0
