"""A package, so that another one called `tests` in an environment does not take its place."""
