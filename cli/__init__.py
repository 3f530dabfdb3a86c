"""The command line: options in, one call of recipes/steps.py, a table out."""
