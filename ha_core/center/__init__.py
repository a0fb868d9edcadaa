"""The management server: it configures, and is not needed for a failover. It keeps nothing: all state is in the database."""
