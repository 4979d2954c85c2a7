"""What torch.save writes: a zip archive of stored members around one pickle."""
