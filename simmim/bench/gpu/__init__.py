"""`simmim bench gpu`: is it right on this GPU, and how fast? Read plan.py first."""
