"""`simmim doctor`: what can be known of a training before it starts."""
