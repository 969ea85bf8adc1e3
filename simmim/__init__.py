"""The SimMIM pretraining pipeline on a Swin Transformer V2 encoder."""
