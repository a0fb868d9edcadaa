"""The agents' processes: aam and vpxa, what they remember on disk, and VMAP between them."""
