"""What a run needs, before it runs: its peak of memory and where that lies, its files, the bytes that it sends."""
