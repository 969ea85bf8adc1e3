"""SimMIM pretraining."""
