"""How a run is, for those who watch it: ``RUN_DIR/status.json``, Prometheus, OTLP.

``record`` is the file's content, ``health`` judges it and ``folders`` finds it: these need the
standard library alone, for probes. ``recorder`` keeps it up to date on rank 0, ``hook`` fills it
after each step, ``metrics`` names what ``prometheus`` and ``otlp`` export of it.
"""
