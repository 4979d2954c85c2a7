"""Other programs as witnesses, each in a process of its own: the libraries that define the formats."""
