"""The named recipes, or one's every knob."""

from __future__ import annotations

from corinfomax.cli.options import Recipes
from corinfomax.recipes import fields, published
from corinfomax.recipes.published import RECIPES


def run(command: Recipes) -> int:
    """The list of recipes, or one recipe's every knob."""
    if command.name is None:
        print(f"{'recipe':<17}{'paper':>7}{'ours':>14}  what it is")
        for name, entry in RECIPES.items():
            paper = f"{entry.paper:.2f}" if entry.paper is not None else "–"
            ours = entry.measured[0] if entry.measured else None
            shown = "not run yet" if ours is None else f"{ours.value:.1f}" + (f" ± {ours.sd:.1f}" if ours.sd else "")
            print(f"{name:<17}{paper:>7}{shown:>14}  {entry.about}")
        print("\ntop-1 of a linear probe, %; corinfomax recipes NAME shows every knob and what ours was measured on")
        return 0
    recipe, entry = published.named(command.name), RECIPES[command.name]
    print(f"{command.name}: {entry.about}\ndata: {entry.data}")
    if entry.paper is not None:
        print(f"the paper's linear probe: {entry.paper:.2f} %")
    for m in entry.measured:
        sd = f" ± {m.sd:.1f}" if m.sd is not None else ""
        print(f"ours: {m.score} {m.value:.1f}{sd} % (n = {m.n}, {m.data}, {m.hardware}, {m.minutes:g} min, {m.commit})")
    print()
    for flag, value in fields.flags(recipe):
        print(f"  --{flag:<26} {value}")
    return 0
