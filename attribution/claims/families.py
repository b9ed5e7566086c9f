"""Many readings of one study at once: which of them differ from zero, with the error over the whole family held.

One value per base and member of the family. Family-wise by the largest |t| under sign flips of whole bases (max-T: Westfall
and Young 1993), exact where there are few bases; false discoveries by Benjamini and Hochberg (1995). Both are scipy's. With n
bases no p is below 2 / 2^n, so that five can show nothing at 5 %: such a map is exploratory.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control, permutation_test, t

RESAMPLES = 9999  # sign flips drawn where there are more


def family(table: pd.DataFrame) -> pd.DataFrame:
    """Test every column of a table with one row per base.

    Args:
        table: bases x members, at least two rows, no value missing.

    Returns:
        One row per member: mean, p (two-sided t-test), p_family (max-T), q (Benjamini–Hochberg). NaN where all bases are alike.
    """
    values = table.to_numpy(dtype="float64")
    observed = _t(values)
    told = np.isfinite(observed)

    def largest(signs: np.ndarray) -> float:
        return float(np.abs(_t(signs[:, None] * values[:, told])).max())

    p = 2 * t.sf(np.abs(observed), len(values) - 1)
    within, q = np.full(len(observed), np.nan), np.full(len(observed), np.nan)
    if told.any():
        flips = permutation_test(
            (np.ones(len(values)),), largest, permutation_type="samples", vectorized=False, alternative="greater",
            n_resamples=RESAMPLES, rng=0,
        ).null_distribution  # fmt: skip
        within[told] = [(flips >= abs(each) - 1e-9).mean() for each in observed[told]]
        q[told] = false_discovery_control(p[told])
    return pd.DataFrame({"mean": values.mean(0), "p": p, "p_family": within, "q": q}, index=table.columns)


def _t(values: np.ndarray) -> np.ndarray:
    """Of the mean over rows; NaN where nothing varies."""
    spread = values.std(axis=0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(spread > 0, values.mean(axis=0) / (spread / len(values) ** 0.5), np.nan)
