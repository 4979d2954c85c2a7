"""Files of torch.save: a zip archive of stored members, one of which is a pickle that describes the tensors."""
