"""Measurements of operators, training and preprocessing: ``megapoly benchmark``."""
