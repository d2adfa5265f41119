"""Images and labels: loading, long-tailed subsets, whitening, augmentation."""
