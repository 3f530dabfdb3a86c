"""Slices: which rows each has, and what a candidate is worth on it."""
