"""Helpers for tests, this project's and users' own: oracles, hypothesis strategies, small models."""
