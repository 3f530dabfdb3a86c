"""What an export proves before it is sealed: outputs, weights and tokens are those of what it was made from."""
