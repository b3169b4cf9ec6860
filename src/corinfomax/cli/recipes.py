"""`corinfomax recipes`: the named recipes, or every setting of one."""

from dataclasses import dataclass
from typing import Annotated

from tyro.conf import Positional, arg

from corinfomax.recipes import fields, published
from corinfomax.recipes.published import RECIPES, Measured


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the named recipes, or show every setting of one."""

    name: Annotated[str | None, Positional, arg(metavar="NAME")] = None
    """The recipe to show, by its name or its .json file."""

    def run(self, typed: frozenset[str]) -> int:
        if self.name is None:
            print(f"{'recipe':<17}{'paper':>7}{'ours':>14}  about")
            for name, entry in RECIPES.items():
                paper = "–" if entry.paper is None else f"{entry.paper:.2f}"
                ours = _mean(entry.measured[0]) if entry.measured else "not run yet"
                print(f"{name:<17}{paper:>7}{ours:>14}  {entry.about}")
            about = "corinfomax recipes NAME shows every setting and what ours was measured on"
            print(f"\nlinear probe, top-1 in %; {about}")
            return 0

        # one recipe: its scores, then its settings
        recipe = published.find_recipe(self.name)
        if self.name in RECIPES:  # else it is a file
            entry = RECIPES[self.name]
            print(f"{self.name}: {entry.about}\ndata: {entry.data}")
            if entry.paper is not None:
                print(f"the paper's linear probe: {entry.paper:.2f} %")
            for m in entry.measured:
                setting = f"n = {m.n}, {m.data}, {m.hardware}, {m.minutes:g} min, {m.commit}"
                print(f"ours: {m.score} {_mean(m)} % ({setting})")
            print()
        for flag, value in fields.flags(recipe).items():
            print(f"  --{flag:<26} {' '.join(map(str, value)) if isinstance(value, tuple) else value}")
        return 0


def _mean(measured: Measured) -> str:
    return f"{measured.value:.1f}" + ("" if measured.sd is None else f" ± {measured.sd:.1f}")
