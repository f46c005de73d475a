"""The device that a run uses, chosen once: ``cpu`` with gloo or ``cuda`` with nccl."""

from megapoly.platform.device import Platform, select_platform, this_machine

__all__ = ["Platform", "select_platform", "this_machine"]
