"""One page that shows a quantized model: where it loses, what it became, and why. Needs no network and no package."""
