"""Training: dynamic sparsity in two stages, fewer steps, and students held to their teachers."""
