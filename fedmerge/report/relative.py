"""Errors relative to another method's, as the papers have them, and how much of the way to the oracle a method goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def err(accuracy: float, base: float) -> float | None:
    """Err = 100 (1 - acc) / (1 - acc_base); None where the base makes no error (Imam et al., T^3, 2025, appendix D.2)."""
    return None if base >= 1 else 100 * (1 - accuracy) / (1 - base)


def mce_t3(errs: Sequence[float | None]) -> float | None:
    """Mean of Err over conditions, those without a value left out (T^3's mCE; in-domain is no condition). None if none is left."""
    known = [value for value in errs if value is not None]
    return sum(known) / len(known) if known else None


def mce_in(errors: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]]) -> float | None:
    """mean_c sum_s E_sc / sum_s E_sc^base, in percent (Hendrycks & Dietterich, ICLR 2019, eq. 1).

    errors, base: corruption -> error in [0, 1] at every severity. Corruptions without a base error are left out.
    """
    ratios = [100 * sum(errors[name]) / sum(base[name]) for name in errors if sum(base[name]) > 0]
    return sum(ratios) / len(ratios) if ratios else None


def closed(accuracy: float, mean: float, oracle: float) -> float | None:
    """Share of the gap between the mean merge and the oracle that a method closes; None where there is no gap."""
    return None if oracle <= mean else (accuracy - mean) / (oracle - mean)
