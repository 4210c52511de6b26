"""Image transforms: decoding, geometry, augmentation, mixing."""
