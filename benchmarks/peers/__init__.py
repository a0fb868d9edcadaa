"""What a Python programmer would use instead, doing the same work; each is measured only where it is installed."""
