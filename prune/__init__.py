"""What is cut: importance of channels, structured surgery, 2:4 sparsity."""
