"""What docs/evidence.md and docs/comparison.md show: each part measures into a results file of its own."""
