"""Hangs: each rank has a process that watches it, and says which rank is behind.

- :mod:`heartbeat`: the rank's side. It beats where it advances, and says how long it may be silent.
- :mod:`beats`: the memory that a rank and its watcher share.
- :mod:`watcher`: the process. It collects stacks and flight records when its rank is silent too
  long, waits for what the other ranks' watchers saw, and ends its rank.
- :mod:`evidence`: what a watcher finds out about its rank.
- :mod:`verdict`: which rank is behind, from the reports of all.

A thread of the rank could not do it: it stops with its process, and with code that holds Python's
global lock. The process needs the standard library alone: 8 MB, started with 0.1 s of a core. The
watchers of a job meet in its run folder, so that they need no network and no launcher.
"""
