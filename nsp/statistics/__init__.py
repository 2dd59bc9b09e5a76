"""Statistics of effects over pairs: intervals, tests corrected for the number of sites, null sets and split halves.

The model: a set of pairs is a sample, and each site has one effect per pair. Pairs are the units that are resampled
(bootstrap) or flipped in sign (tests); sites stay together, so whatever correlation they have is kept. Every function
takes arrays with a ``pair`` dim and gives back arrays without it.

Which sites count: a site whose effect is exactly zero in every pair (nothing ran there, see the receipts) is in no
family and never significant; a cell that is NaN (a shorter prompt, a pair without a scale) is missing, and its site is
judged by the pairs that it has (``n``); a site with fewer than two pairs is not tested.

Cost: one matrix product of (resample, pair) with (pair, site), in blocks; tens of thousands of sites take seconds.

Limits: a test says that an effect is not a matter of chance, not that it is large: read it with the interval. It
assumes that pairs are independent (see `average_pairs` where they are not) and that without an effect a pair's value is
as likely to be x as -x. Strong skew is therefore found too: for values of an exponential distribution less its mean, 30
pairs and 30 sites, a third of runs have a significant site though every mean is zero. Nothing here speaks of pairs made
in another way than these.
"""

from nsp.statistics.intervals import mean_effects
from nsp.statistics.random_sets import matched_null, matched_nulls, random_sites
from nsp.statistics.sign_flip import sign_flip_test, sign_flip_tests
from nsp.statistics.site_table import average_pairs
from nsp.statistics.split_halves import split_half, split_pairs

__all__ = [
    "average_pairs",
    "matched_null",
    "matched_nulls",
    "mean_effects",
    "random_sites",
    "sign_flip_test",
    "sign_flip_tests",
    "split_half",
    "split_pairs",
]
