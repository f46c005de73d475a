"""Compare activations, look into what was learned, and report it; the paper's theory."""
