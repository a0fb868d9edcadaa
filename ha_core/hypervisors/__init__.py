"""Drivers that start, stop and list VMs for vpxa."""
