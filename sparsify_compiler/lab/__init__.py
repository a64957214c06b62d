"""The model that sparse attention is judged on: a small video world, and a Wan trained on it."""
