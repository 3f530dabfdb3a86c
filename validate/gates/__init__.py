"""Gates: limits held against candidates, and the verdict that statistics allow."""
