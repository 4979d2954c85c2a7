"""What work takes in memory, disk and time, known before it begins."""
