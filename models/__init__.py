"""What is compressed: data and tasks, the anatomy of architectures, checkpoints with their lineage."""
