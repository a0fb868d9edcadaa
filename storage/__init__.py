"""Stores: where records and transactions become durable. Imported as ``ha_core.storage``."""

if __name__ != "ha_core.storage":  # a second copy of every class would be loaded under the bare name
    raise ImportError("import this package as ha_core.storage")
