"""The words of the command line, read once: the command with its options, and the flags that were typed."""

from collections.abc import Sequence
from dataclasses import make_dataclass
from typing import Annotated, Any, get_args

import tyro
from tyro.conf import Suppress, subcommand

from corinfomax.cli import doctor, embed, evaluate, export, neighbors, pretrain, recipes, report, tune
from corinfomax.recipes import fields
from corinfomax.recipes.fields import Recipe
from corinfomax.recipes.published import RECIPES

ABOUT = "Self-supervised pretraining of image backbones that tells you whether it worked."
Scoring = evaluate.Evaluate | embed.Embed | neighbors.Neighbors | report.Report
Command = pretrain.Pretrain | tune.Tune | doctor.Doctor | Scoring | export.Export | recipes.Recipes


def parse(argv: Sequence[str]) -> tuple[Command, frozenset[str]]:
    """The command with its options, and the typed flags, such as `optim.lr`; exits after --help or a mistake."""
    usual = RECIPES["cpu-small"].recipe
    helped = argv[:1] in (["pretrain"], ["tune"]) and not {"-h", "--help"}.isdisjoint(argv)

    # the commands: the chosen one with its whole description, the others with a line
    choices: Any = None
    for kind in get_args(Command):
        name, line = kind.__name__.lower(), kind.__doc__.partition("\n")[0]
        if argv[:1] == [name]:
            line = None
            if helped:  # without the settings, for which tyro takes three lines each
                settings, rest = ("settings", Annotated[Recipe, Suppress], usual), {"__doc__": kind.__doc__}
                kind = make_dataclass(name, [settings], bases=(kind,), namespace=rest, frozen=True, kw_only=True)
        choice = Annotated[kind, subcommand(name, description=line)]
        choices = choice if choices is None else choices | choice
    try:
        command: Command = tyro.cli(choices, prog="corinfomax", description=ABOUT, args=argv)
    except SystemExit:
        if helped:  # tyro has printed the options; the settings follow, a line each
            print("settings of a recipe, with the values of cpu-small; the second view has the same, --views.1.…")
            print(*fields.help_lines(usual), sep="\n")
            print("corinfomax recipes NAME lists every setting of a recipe, rarely used ones too")
        raise

    # without dashes, and a switch with its positive name
    flags = (word.partition("=")[0].removeprefix("--").replace("_", "-") for word in argv if word.startswith("--"))
    return command, frozenset(flag.replace(".no-", ".").removeprefix("no-") for flag in flags)
