"""Training: dynamic sparsity in two stages."""
