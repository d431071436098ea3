"""A machine and a row of its results, made up."""

KEY = {
    "task": "train",
    "model": "tiny",
    "implementation": "ours-none",
    "dtype": "float32",
    "batch": 8,
    "size": 32,
    "layout": "channels-last",
}
HEADER = {
    "machine": "some-cpu-2-cores",
    "cpu": "Some CPU",
    "instructions": "AVX512",
    "cores": 2,
    "device": "cpu",
    "driver": None,
    "versions": {"torch": "2.14.1"},
    "commit": "0123456789ab",
    "date": "2026-01-31",
}
