"""Recipes that ship with limbeck."""
