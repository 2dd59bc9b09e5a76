"""Experiments: one module each. Importing this makes every kind known to the registry."""

from nsp.experiments import patching
from nsp.experiments.patching import activation_patching
from nsp.experiments.registry import EXPERIMENTS, Experiment
from nsp.experiments.runner import run

__all__ = ["EXPERIMENTS", "Experiment", "activation_patching", "patching", "run"]
