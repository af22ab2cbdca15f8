"""Tasks besides classification: segmentation and retrieval. Each is a package of its own, imported by name."""
