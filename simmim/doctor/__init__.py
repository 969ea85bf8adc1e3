"""`simmim doctor`: check a training setup before it starts."""
