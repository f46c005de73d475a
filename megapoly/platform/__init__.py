"""Devices and hosts: which there are, what they can do, and every work-around for the engine."""
