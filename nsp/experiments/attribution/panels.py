"""The figures of this kind under their older name, until its registration takes `figures`."""

from nsp.experiments.attribution.figures import figures as panels

__all__ = ["panels"]
