"""SimMIM: masking, model and losses."""
