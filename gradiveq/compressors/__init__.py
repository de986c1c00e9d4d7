"""The compressors by name. Adding one takes a file here and a line below (README, "Adding a method")."""

from __future__ import annotations

from gradiveq.compressors.base import Compressor, Constants, Draw
from gradiveq.compressors.identity import Identity

#: name -> class; its fields are what `--methods NAME:FIELD=VALUE` sets.
COMPRESSORS: dict[str, type[Compressor]] = {compressor.name: compressor for compressor in (Identity,)}

__all__ = ["COMPRESSORS", "Compressor", "Constants", "Draw"]
