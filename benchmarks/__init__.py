"""Time and memory of the DenseNets that people can choose from."""
