"""Plan for a cluster: which form and mesh suit a model, before anything runs."""
