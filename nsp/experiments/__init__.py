"""Experiments: a package each. Importing this makes every kind known to the registry."""

from nsp.experiments import pairs
from nsp.experiments.accessor import report
from nsp.experiments.alignment_scan.job import alignment_scan
from nsp.experiments.attribution.doors import attribution, discover
from nsp.experiments.bias_scan.job import bias_scan
from nsp.experiments.capture.job import capture
from nsp.experiments.capture.summary import top_examples, unit_statistics
from nsp.experiments.causal_tracing.job import causal_tracing
from nsp.experiments.contrast.job import contrast, control_vectors
from nsp.experiments.direction.job import find_direction
from nsp.experiments.feature_store import FeatureStore
from nsp.experiments.html_report import report_page
from nsp.experiments.lens.job import logit_lens, patchscope_lens, tuned_lens
from nsp.experiments.lens.logit_attribution import logit_attribution
from nsp.experiments.lens.tuned import load_tuned_lens, train_tuned_lens
from nsp.experiments.mean_activations.job import mean_activations
from nsp.experiments.patching.doors import activation_patching, layer_recovery
from nsp.experiments.patchscope.job import patchscope
from nsp.experiments.path_patching.job import path_patching
from nsp.experiments.registry import EXPERIMENTS, Experiment
from nsp.experiments.runner import run
from nsp.experiments.steering.job import steering

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
    "patchscope",
    "patchscope_lens",
    "path_patching",
    "report",
    "report_page",
    "run",
    "steering",
    "top_examples",
    "train_tuned_lens",
    "tuned_lens",
    "unit_statistics",
]
