"""Experiments: one module each. Importing this makes every kind known to the registry."""

from nsp.experiments import pairs, patching
from nsp.experiments.accessor import report
from nsp.experiments.alignment_scan import alignment_scan
from nsp.experiments.attribution import attribution, discover
from nsp.experiments.bias_scan import bias_scan
from nsp.experiments.capture import capture
from nsp.experiments.capture_summary import top_examples, unit_statistics
from nsp.experiments.causal_tracing_job import causal_tracing
from nsp.experiments.contrast import contrast, control_vectors
from nsp.experiments.direction import find_direction
from nsp.experiments.feature_store import FeatureStore
from nsp.experiments.lens_attribution import logit_attribution
from nsp.experiments.lens_job import logit_lens, patchscope_lens, tuned_lens
from nsp.experiments.lens_tuned import load_tuned_lens, train_tuned_lens
from nsp.experiments.mean_activations import mean_activations
from nsp.experiments.patching_doors import activation_patching, layer_recovery
from nsp.experiments.patchscope_job import patchscope
from nsp.experiments.path_patching_job import path_patching
from nsp.experiments.registry import EXPERIMENTS, Experiment
from nsp.experiments.runner import run
from nsp.experiments.steering import steering

__all__ = [
    "EXPERIMENTS",
    "Experiment",
    "FeatureStore",
    "activation_patching",
    "alignment_scan",
    "attribution",
    "bias_scan",
    "capture",
    "causal_tracing",
    "contrast",
    "control_vectors",
    "discover",
    "find_direction",
    "layer_recovery",
    "load_tuned_lens",
    "logit_attribution",
    "logit_lens",
    "mean_activations",
    "pairs",
    "patching",
    "patchscope",
    "patchscope_lens",
    "path_patching",
    "report",
    "run",
    "steering",
    "top_examples",
    "train_tuned_lens",
    "tuned_lens",
    "unit_statistics",
]
