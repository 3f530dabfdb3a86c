"""Checkpoint -> artifact: what each format's exporter does, and the artifact folder with its manifest."""
