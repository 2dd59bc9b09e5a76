"""Mean activations over a set of prompts, for mean ablation."""
