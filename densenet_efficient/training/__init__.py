"""The main job: train a classifier on real images, measure it against the naive DenseNet, classify image files."""
