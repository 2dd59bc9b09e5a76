"""Direct logit attribution: who wrote a logit into the residual stream."""

from nsp.experiments.callable_package import make_callable

make_callable(__name__)
