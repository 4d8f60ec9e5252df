"""What is decided about a calibrated model by measuring it."""
