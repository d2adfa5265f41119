"""Images and labels: reading them, making the long tail, whitening, augmentation."""
