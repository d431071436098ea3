"""The main job: train a classifier, measure it against the naive DenseNet, classify image files."""
