"""What can be known before a job is started: installation, layouts, memory, time, exactness."""
