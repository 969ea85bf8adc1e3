"""Reading the files of other libraries: pickles, what wraps a model's tensors, and their names."""
