"""Fencing devices: what makes sure that a host is off. None is built in yet; the interface is in interfaces.py."""
