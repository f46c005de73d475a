"""Soak: faults strike a job again and again; what it trains must equal an uninterrupted run."""
