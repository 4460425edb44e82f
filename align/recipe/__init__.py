"""The recipe: YAML in, strict types out. `from align.recipe import Recipe, load_recipe`."""

from align.recipe.load import dump_recipe, load_recipe
from align.recipe.schema import Recipe

__all__ = ["Recipe", "dump_recipe", "load_recipe"]
