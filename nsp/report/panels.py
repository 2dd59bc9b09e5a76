"""The older name of a figure's type, for branches that still use it."""

from nsp.report.figures import Figure as Drawing

__all__ = ["Drawing"]
