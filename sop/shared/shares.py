"""Shares in percent, for people."""

__all__ = ["percent"]


def percent(share: float, digits: int = 2) -> str:
    """Share in percent that never rounds to all or nothing.

    Parameters
    ----------
    share : float
        From 0 to 1.
    digits : int
        Behind the decimal point.

    Returns
    -------
    text : str
        Without the sign. Only 1 gives ``100.00`` and only 0 gives ``0.00``: others that would be
        rounded to these are ``over 99.99`` and ``under 0.01``.
    """
    text, step = f"{100 * share:.{digits}f}", 10**-digits
    if share < 1 and float(text) == 100:
        return f"over {100 - step:.{digits}f}"
    return f"under {step:.{digits}f}" if share > 0 and float(text) == 0 else text
