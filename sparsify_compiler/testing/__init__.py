"""What tests need, for this project's and for users' own: oracles, hypothesis strategies, small models."""
