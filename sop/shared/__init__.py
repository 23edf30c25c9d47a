"""What commands share: console, progress, output files, streams, endings."""
