"""Attribution from gradients, the choice of circuits, and their proof by exact patching."""

from nsp.experiments.callable_package import make_callable

make_callable(__name__)
