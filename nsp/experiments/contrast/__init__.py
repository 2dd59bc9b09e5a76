"""Neurons that tell two sets of prompts apart, control vectors, and what they are made of."""
