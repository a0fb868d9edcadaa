"""Transports: how bytes travel. Imported as ``ha_core.transports``."""

if __name__ != "ha_core.transports":  # a second copy of every class would be loaded under the bare name
    raise ImportError("import this package as ha_core.transports")
