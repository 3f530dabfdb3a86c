"""Intervals, tests and distributions: numbers in, numbers out."""
