"""Recipes as jobs that were checked."""

from veneer.recipe.settings import Recipe
from veneer.train.job import read_job
from veneer.train.preflight import Checked, preflight


def checked(recipe: Recipe) -> Checked:
    return preflight(read_job(recipe))
