"""One package for each checkpoint format; ``registry`` lists them and finds them by name."""
