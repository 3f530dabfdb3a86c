"""The plug-in surface: one descriptor a backend, found by name."""
