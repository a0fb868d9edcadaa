"""What proves that somebody belongs to the cluster: its key, and how the key travels to a new host."""
