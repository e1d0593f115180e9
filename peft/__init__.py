"""What changes a layer's weight: adapters, stores and profiles."""
