"""What is installed on this machine, what it is for, and whether it works together."""
