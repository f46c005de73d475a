"""Code that is copied into an exported folder; it needs only torch and transformers."""
