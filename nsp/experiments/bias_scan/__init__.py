"""A paired bias scan of an aligned and a base model: divergence by layer, star layers, neurons, pair gaps."""
