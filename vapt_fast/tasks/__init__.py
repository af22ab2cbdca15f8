"""Tasks besides classification: segmentation and retrieval. Each is imported by its name."""
