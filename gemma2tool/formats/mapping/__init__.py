"""What formats share: tensor tables, and the invertible transforms between a format's tensors and the canonical ones."""
