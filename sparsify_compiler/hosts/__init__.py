"""Sparse attention in scripts that were written without it."""
