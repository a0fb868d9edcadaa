"""Shells: what connects the machines to the world, under trio."""
