"""What an exported folder holds beside its weights: a model in torch and transformers alone."""
