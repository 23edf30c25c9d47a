"""What accompanies an exported unit: its description, and files for other tools' build systems."""
