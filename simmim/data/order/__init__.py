"""Which sample comes next, its random numbers, and the interface of a source of samples."""
