"""Bytes on disk -> batches on the mesh: sources, decoding, augmentation, tokens, the input pipeline."""
