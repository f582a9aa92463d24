"""One reader a format; each is a `checkpoint.base.TensorSource`."""
