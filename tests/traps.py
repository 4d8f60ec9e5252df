"""Small models written the way people write them, each with one trap for a tool that captures graphs."""

from __future__ import annotations

import composition_traps
import context_traps
import module_traps
import signature_traps
import size_traps
import state_traps
import value_traps
from trap_inputs import Trap

TRAPS: dict[str, Trap] = {
    **size_traps.TRAPS,
    **value_traps.TRAPS,
    **module_traps.TRAPS,
    **signature_traps.TRAPS,
    **state_traps.TRAPS,
    **context_traps.TRAPS,
    **composition_traps.TRAPS,
}
