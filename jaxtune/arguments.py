"""Arguments that users of other libraries pass: which have no meaning here, and which would change the result."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any


def sort_out(
    where: str, given: Mapping[str, Any], ignored: Sequence[str], refused: Mapping[str, Any]
) -> None:
    """Raises for arguments that would change the result, warns once of those that mean nothing here."""
    unknown = given.keys() - set(ignored) - refused.keys()
    if unknown:
        raise TypeError(f"{where} got unknown arguments: {', '.join(sorted(unknown))}")
    for name, neutral in refused.items():
        if name in given and given[name] not in (neutral, None):
            raise NotImplementedError(f"{where}: {name}={given[name]!r} is not supported by jaxtune")
    idle = [name for name in given if name in ignored]
    if idle:
        warnings.warn(f"{where}: no effect in jaxtune: {', '.join(idle)}", stacklevel=4)
