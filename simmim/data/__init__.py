"""The order of samples, the datasets they are read from, transforms, and batches."""
