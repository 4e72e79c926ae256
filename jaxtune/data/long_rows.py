"""Rows that are longer than they may be, and are not cut: left out or refused, by name and count."""

import logging
from typing import Literal

import numpy as np

logger = logging.getLogger(__name__)

TooLong = Literal["drop", "raise"]
SHOWN = 5  # rows that a message names


def leave_out(fits: np.ndarray, lengths: np.ndarray, fault: str, advice: str, too_long: TooLong) -> None:
    """Tells or refuses the rows that do not fit.

    Args:
        fits: bool [rows]. lengths: int [rows], tokens.
        fault: what is wrong with them ("rows are longer than max_length=8"). advice: what to do.
        too_long: "drop" or "raise".

    Raises:
        ValueError: some do not fit and are to be refused, or none fits.
    """
    if fits.all():
        return
    others = np.flatnonzero(~fits).tolist()
    named = ", ".join(f"row {row} ({lengths[row]} tokens)" for row in others[:SHOWN])
    more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
    said = f"{len(others)} of {len(fits)} {fault}: {named}{more}"
    if too_long == "raise" or not fits.any():
        raise ValueError(f"{said}; {advice}, or leave them out with too_long='drop'")
    logger.warning("%s; they are dropped: %s", said, advice)
