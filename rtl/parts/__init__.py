"""What units are made of: arithmetic and pipelines, each in one place and tested alone."""
