"""Training runs with one fault each, and healthy ones: what is said of them, and when."""
