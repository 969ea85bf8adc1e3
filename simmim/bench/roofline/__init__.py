"""The least time of a training step: counted operations and bytes over what a device reaches."""
