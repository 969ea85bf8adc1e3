"""Which sample comes next, its random numbers, and what a source of samples is."""
