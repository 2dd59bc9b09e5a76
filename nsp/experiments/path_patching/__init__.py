"""Path patching: from a sender to a receiver, with everything between them frozen."""

from nsp.experiments.callable_package import make_callable

make_callable(__name__)
