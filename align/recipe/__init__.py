"""The recipe: YAML in, strict types out. `from align.recipe import Recipe, load_recipe`."""

from align.recipe.schema import *  # noqa: F403
