"""Measuring a quantized model against the float model that it came from: where it loses, what it would lose, and why."""
