"""Tables, figures and one page from any set of runs; see README.md in this folder."""
