"""List the recipes, or print one of them in full with your overrides applied.

What is printed is itself a recipe: redirect it to a file, edit it, and give the file's path in place of a name.

  gigatok-ds recipes
  gigatok-ds recipes VQ_BL256 optimizer.lr=2e-4 training.steps=1000
"""

from __future__ import annotations

import argparse

HELP = "list the recipes, or show one resolved"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="name of a recipe or path of a YAML file; without it, all are listed")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe settings, e.g. optimizer.lr=2e-4")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.config.load import load_recipe, recipe_names, recipe_summary, recipe_to_yaml

    if args.recipe:
        print(recipe_to_yaml(load_recipe(args.recipe, args.overrides)), end="")
        return 0
    for name in recipe_names():
        print(f"{name:20s} {load_recipe(name).kind:10s} {recipe_summary(name)}")
    return 0
