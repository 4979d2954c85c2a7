"""One package or module for each checkpoint format; ``registry`` finds them by name."""
