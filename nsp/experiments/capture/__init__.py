"""Activations of chosen components over a file of prompts, streamed into a store."""
