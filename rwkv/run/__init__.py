"""Put a run of train.py together from all folders."""
