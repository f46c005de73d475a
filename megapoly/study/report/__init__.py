"""Tables, figures and one page from any set of runs; see docs/reference/report.md."""
