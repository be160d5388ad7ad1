"""Our code, its peers and the machine's floors, side by side: `make bench`."""
