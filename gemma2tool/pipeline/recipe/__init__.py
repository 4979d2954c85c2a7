"""Recipes: YAML files that hold what the command line's options hold, for several sources and outputs."""
